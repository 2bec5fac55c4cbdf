"""Adapter folders, which may come from anyone: read and checked as a whole before a model is touched.

An adapter is ``adapter_config.json`` and ``adapter_model.safetensors``. Both are bounded in size, must agree with each
other (ranks, names of weights), and are read without importing or running anything that they name.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import safe_open
from torch import Tensor, nn

from lorma.adapters import validation as check
from lorma.adapters.kinds import kind_of, known_types, rank_dimensions
from lorma.adapters.regex_cost import NAME_LENGTH, ways_of
from lorma.adapters.untrusted import TensorInfo, read_header, read_json
from lorma.errors import InputError, did_you_mean, one_line
from lorma.tuners.names import PREFIX, by_unwrapped

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
DELTA = "token_adapter.trainable_tokens_delta"
"""What trained rows of an embedding are called, behind its path."""
PICKLE_NAME = "adapter_model.bin"
MAX_FACTOR = check.MAX_RANK
"""Numbers in one factor."""
MAX_PATTERNS = 1024
"""Entries of ``rank_pattern`` and the like, each of which PEFT matches against each layer."""
MAX_WORK = 2 * 10**8
"""Ways to match all patterns on all weights: some four seconds. They grow with the fourth power of a name's length."""
REFUSED_FIELDS = """layer_replication megatron_config loftq_config eva_config corda_config lora_ga_config
    arrow_config""".split()
"""Fields of those with which PEFT imports modules or computes on data; a trained adapter needs none of them."""
MODEST_RANK = 256
"""A stated rank up to this is allowed where no weight is as wide: TLoRA's files hold nothing wider than their ranks."""
WIDE_RANK = 4096
"""A rank above this may not exceed the weight's other dimension: r × r numbers would be more than the file holds."""


@dataclass(frozen=True)
class AdapterFile:
    """An adapter folder that has been looked through; tensors are read when they are asked for.

    Attributes:
        folder: where it lies.
        config: its configuration, of the class that PEFT has for the method.
        tensors: shapes and dtypes of its weights by name, without wrappers of the model it was trained on.
        stored: the names that the file has them under.
    """

    folder: Path
    config: PeftConfig
    tensors: dict[str, TensorInfo]
    stored: dict[str, str]

    @property
    def method(self) -> str:
        """The method's name in PEFT, such as ``"LORMA"``."""
        return str(getattr(self.config.peft_type, "value", self.config.peft_type))

    def read(self, name: str) -> Tensor:
        """One tensor, as it is stored."""
        with safe_open(self.folder / WEIGHTS_NAME, framework="pt") as file:
            tensor: Tensor = file.get_tensor(self.stored[name])
        return tensor

    def modules(self, part: str) -> list[str]:
        """Names of the tensors called ``part`` (``"lorma_A"``) without that part, sorted by layer."""
        end = f".{part}"
        found = [name.removesuffix(".weight").removesuffix(end) for name in self.tensors if part_of(name) == part]
        return sorted(found, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)])


def read_adapter(folder: str | Path) -> AdapterFile:
    """Look through an adapter folder.

    Nothing that the folder names is imported, opened or downloaded, and no tensor is read.

    Raises:
        InputError: whatever is wrong with it, in one line: a missing, linked, oversized, truncated or foreign file, a
            field of a wrong type or value, a method that is not known, ranks that the weights do not have.
    """
    folder = Path(folder)
    config = read_config(folder)
    if not (folder / WEIGHTS_NAME).exists() and (folder / PICKLE_NAME).exists():
        raise InputError(f"{folder} has no {WEIGHTS_NAME}; {PICKLE_NAME} is not read, only safetensors")
    header = read_header(folder, WEIGHTS_NAME)
    stored = by_unwrapped(header)
    found = AdapterFile(folder, config, {name: header[key] for name, key in stored.items()}, stored)
    check_weights(folder, config, found.tensors)
    return found


def read_config(folder: Path) -> PeftConfig:
    """The configuration of an adapter folder; see :func:`read_adapter`."""
    content = read_json(folder, CONFIG_NAME)
    path = folder / CONFIG_NAME
    kind = content.get("peft_type")
    known = [str(member.value) for member in PEFT_TYPE_TO_CONFIG_MAPPING]
    if not isinstance(kind, str) or kind not in known:
        hint = did_you_mean(kind, known) if isinstance(kind, str) else ""
        raise InputError(one_line(f"{path}: peft_type={kind!r} is no method of PEFT or lorma{hint}"))
    cls: Any = PEFT_TYPE_TO_CONFIG_MAPPING[kind]  # type: ignore[index]
    if cls.__module__.startswith("peft.") and kind not in known_types():  # which may load further files by name
        own = [name for name in known_types() if name in known and _from_peft(name)]
        raise InputError(f"{path}: peft_type={kind!r} is not read here; allowed of PEFT's own: {', '.join(own)}")
    try:
        _check_common(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # unknown keys of a later version, patterns that will change their meaning
            config: PeftConfig = cls.from_peft_type(**content)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(one_line(f"{path}: {error}")) from None
    # Only PEFT's Auto classes read this; they import the module that it names.
    config.auto_mapping = None
    return config


def _check_common(content: dict[str, Any]) -> None:
    for name in ("base_model_name_or_path", "revision", "task_type", "peft_version"):
        value = content.get(name)
        if value is not None and (not isinstance(value, str) or len(value) > 4096 or not value.isprintable()):
            raise TypeError(f"{name}={value!r} must be a string or null")
    check.check_bool("inference_mode", content.get("inference_mode", True))
    check.check_bool("ensure_weight_tying", content.get("ensure_weight_tying", False))
    check.check_tokens("trainable_token_indices", content.get("trainable_token_indices"))
    for name in REFUSED_FIELDS:
        if content.get(name):
            raise ValueError(f"{name} must be null in an adapter that has been trained")
    for name in ("rank_pattern", "alpha_pattern", "fused_projections"):
        if isinstance(content.get(name), dict) and len(content[name]) > MAX_PATTERNS:
            raise ValueError(f"{name} has {len(content[name]):,} entries; allowed: {MAX_PATTERNS:,}")
    for name in ("target_modules", "exclude_modules"):
        check.check_names(name, content.get(name))
        check.check_regex(name, content.get(name))
    layers = content.get("layers_pattern")
    for pattern in layers if isinstance(layers, list) else [layers]:
        check.check_regex("layers_pattern", pattern)
    for name in ("modules_to_save", "target_parameters"):
        check.check_names(name, content.get(name), pattern=False)
    if content.get("ensure_weight_tying"):  # with which PEFT reads names as regular expressions
        for name in ("modules_to_save", "target_modules"):
            for pattern in content[name] if isinstance(content.get(name), list) else ():
                check.check_regex(name, pattern)
    for name in ("r", "init_r", "target_r"):
        if content.get(name) and not isinstance(content[name], int):
            raise TypeError(f"{name}={content[name]!r} must be an int")
    for name, value in content.items():
        if name.endswith(("alpha", "alpha_pattern", "dropout")):  # PEFT does not look at its methods' own
            for number in value.values() if isinstance(value, dict) else [value]:
                check.check_float32(name, number)
    if not isinstance(content.get("rank_pattern") or {}, dict):
        raise TypeError(f"rank_pattern={content['rank_pattern']!r} must be a dict from module names to ranks")
    for name in ("rank_pattern", "alpha_pattern", "fused_projections"):
        for pattern in content[name] if isinstance(content.get(name), dict) else ():
            check.check_regex(f"key of {name}", pattern)


def _from_peft(kind: str) -> bool:
    cls: Any = PEFT_TYPE_TO_CONFIG_MAPPING[kind]  # type: ignore[index]
    return bool(cls.__module__.startswith("peft."))


def check_names(folder: Path, weights: tuple[str, ...], tensors: Iterable[str]) -> None:
    """Refuse a file without any weight of the method's (``InputError``)."""
    if weights and not any(part_of(name) in weights for name in tensors):
        first = ", ".join(sorted(tensors)[:2]) or "nothing"
        named = f"{folder / WEIGHTS_NAME} holds no weights named {' or '.join(weights)}"
        raise InputError(one_line(f"{named}; it holds {first}"))


def check_weights(folder: Path, config: Any, tensors: dict[str, TensorInfo]) -> None:
    """Refuse weights that are another method's, too large, or of other ranks than ``config`` says.

    Raises:
        InputError: naming the file, the weight, and both ranks.
    """
    check_names(folder, getattr(config, "weight_names", ()), tensors)
    path = folder / WEIGHTS_NAME
    _check_tokens(folder, config, tensors)
    ranks_change, dimensions = kind_of(config).ranks_change, rank_dimensions()
    least = int(not ranks_change)
    factors = {name: info for name, info in tensors.items() if part_of(name) in dimensions}
    for name, (shape, dtype) in factors.items():
        numbers = math.prod(shape)
        if not dtype.is_floating_point or not shape or not least <= numbers <= MAX_FACTOR:
            raise InputError(
                f"{path}: {name} is of type {dtype} and shape {list(shape)}; a factor holds floating-point numbers, "
                f"at least {least} and at most {MAX_FACTOR:,}"
            )
        r = shape[dimensions[part_of(name)]] if len(shape) > 1 else 0
        if r > WIDE_RANK and r > numbers // r:
            raise InputError(
                f"{path}: {name} has shape {list(shape)}; a rank of {r} may be at most its other dimension, "
                f"{numbers // r}, or {WIDE_RANK}"
            )
    widest = max((size for shape, _ in factors.values() for size in shape), default=0)
    stated = [getattr(config, name, None) for name in ("r", "init_r", "target_r")]
    stated += [value for value in (getattr(config, "rank_pattern", None) or {}).values() if isinstance(value, int)]
    for rank in stated:
        if factors and isinstance(rank, int) and rank > max(widest, MODEST_RANK):
            raise InputError(
                f"{folder / CONFIG_NAME} states a rank of {rank}; the widest weight in {path} has {widest}"
            )
    if ranks_change:
        return
    patterns = compiled(getattr(config, "rank_pattern", None))
    longer = max(1.0, max(map(len, factors), default=0) / NAME_LENGTH)
    work = len(factors) * sum(map(ways_of, patterns)) * longer**4
    if work > MAX_WORK:
        raise InputError(f"{folder / CONFIG_NAME}: rank_pattern can take very long to match; name the modules in full")
    for name, (shape, _) in factors.items():
        part = part_of(name)
        dimension = dimensions[part]
        rank = shape[dimension] if dimension < len(shape) else None
        allowed = _ranks_of(name, part, config, patterns)
        if rank not in allowed:
            raise InputError(
                f"{path}: {name} has shape {list(shape)}, but {CONFIG_NAME} states rank "
                f"{' or '.join(map(str, sorted(allowed)))} for it"
            )


def _check_tokens(folder: Path, config: Any, tensors: dict[str, TensorInfo]) -> None:
    """Refuse trained tokens of which the file holds another number of rows than the configuration states."""
    wanted = getattr(config, "trainable_token_indices", None)
    counts = {len(rows) for rows in (wanted.values() if isinstance(wanted, dict) else [wanted or ()])}
    path, found = folder / WEIGHTS_NAME, {key: info for key, info in tensors.items() if key.endswith(f".{DELTA}")}
    if wanted and not found:
        raise InputError(f"{folder / CONFIG_NAME} states trainable_token_indices; {path} holds no {DELTA}")
    for name, (shape, dtype) in found.items():
        if not dtype.is_floating_point or len(shape) != 2 or shape[0] not in counts:
            allowed = " or ".join(map(str, sorted(counts)))
            raise InputError(
                f"{path}: {name} is of type {dtype} and shape {list(shape)}; by trainable_token_indices of "
                f"{CONFIG_NAME} it holds {allowed} rows of floating-point numbers"
            )


def _ranks_of(name: str, part: str, config: Any, patterns: dict[str, re.Pattern[str]]) -> set[int]:
    """Ranks that the configuration states for the layer that a weight belongs to.

    Wrappers inside each other (several parameters of a module, the two weights of an attention) go by other names in
    the pattern than in the file.
    """
    layer = name.removesuffix(".weight").removesuffix(f".{part}").removeprefix(PREFIX).partition(".base_layer")[0]
    parameters = [p.rpartition(".")[2] for p in getattr(config, "target_parameters", None) or ()]
    names = [layer, *(f"{layer}.{parameter}" for parameter in parameters)]
    ranks = getattr(config, "rank_pattern", None) or {}
    return {matching(patterns, ranks, config.r, candidate) for candidate in names}


def matching(patterns: dict[str, re.Pattern[str]], values: dict[str, Any], default: Any, name: str) -> Any:
    """The value of the first pattern that a module's name matches, as PEFT looks ranks and alphas up."""
    return next((values[key] for key, pattern in patterns.items() if pattern.match(name)), default)


def compiled(values: dict[str, Any] | None) -> dict[str, re.Pattern[str]]:
    """The keys of ``rank_pattern`` or the like, ready for :func:`matching`."""
    return {key: re.compile(rf"(.*\.)?({key})$") for key in values or {}}


def part_of(name: str) -> str:
    """``"lorma_A"`` of ``"….query.lorma_A"``, ``"lora_A"`` of ``"….query.lora_A.weight"``."""
    return name.removesuffix(".weight").rpartition(".")[2]


def check_whole_modules(model: nn.Module, adapter: AdapterFile) -> None:
    """Refuse ``modules_to_save`` that the file does not hold whole, before PEFT makes copies of them.

    Raises:
        InputError: naming the weight.
    """
    wanted = tuple(getattr(adapter.config, "modules_to_save", None) or ())
    for path, module in model.named_modules() if wanted else ():
        if not path.endswith(wanted):
            continue
        for key, tensor in module.state_dict().items():
            name = f"{PREFIX}{path}.{key}"
            if name not in adapter.tensors or adapter.tensors[name].shape != tuple(tensor.shape):
                found = list(adapter.tensors[name].shape) if name in adapter.tensors else "nothing"
                raise InputError(
                    f"{adapter.folder} cannot be used: its modules_to_save name {path}, for which {WEIGHTS_NAME} "
                    f"should hold {name} of shape {list(tensor.shape)}; it holds {found}"
                )


def check_adapter_folder(folder: Path, weights: tuple[str, ...]) -> None:
    """Refuse a folder whose weights file is truncated or holds another method's adapter; no file is no error.

    Args:
        weights: names that the method gives its weights.

    Raises:
        InputError: naming the file and what it holds instead.
    """
    if (folder / WEIGHTS_NAME).exists():
        check_names(folder, weights, read_header(folder, WEIGHTS_NAME))


def check_known(places: Iterable[str], found: Iterable[str], parts: tuple[str, ...]) -> None:
    """Refuse adapter weights that the adapted model has no place for, which PEFT would leave out without a word.

    Args:
        places: names in the model.
        found: names in the file, which may call the model ``base_model.model``.
        parts: names of the method's own parameters; others (biases, heads) are left to PEFT.

    Raises:
        ValueError: naming the weight.
    """
    wrapped = any(name.startswith(PREFIX) for name in places)
    for key in found:
        name = key if wrapped else key.removeprefix(PREFIX)
        if any(f".{part}" in key for part in parts) and name not in places:
            raise ValueError(f"the adapter file holds {name}, which the adapted model does not have")
