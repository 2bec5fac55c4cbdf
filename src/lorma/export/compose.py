"""Two LoRMA₊ adapters into one: ``(I + s₂B₂A₂)(I + s₁B₁A₁) = I + BA`` of rank r₁ + r₂, exactly (docs/method.md).

The files alone say all that is needed for ordinary layers of which the side is known. What they do not say (which side
``"auto"`` took, how many experts or groups a weight holds) is asked of the base model's structure, if it is at hand.
"""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from torch import Tensor

from lorma import functional
from lorma.adapters.folder import DELTA, WEIGHTS_NAME, WIDE_RANK, AdapterFile, part_of, read_adapter
from lorma.adapters.untrusted import copy_json
from lorma.errors import InputError, one_line
from lorma.export.output import ADAPTER
from lorma.files import META_FILE, check_output, write_folder
from lorma.functional.multiplier import Side
from lorma.methods.lorma.tuner import LormaConfig, LormaLayer
from lorma.methods.lorma.tuner.files import LayerFile, config_name, layers_of, parts_of, scaling_of, split_factors
from lorma.methods.lorma.tuner.weighted import layerwise_config
from lorma.models.structure import Base, meta_model
from lorma.tuners.names import PREFIX

HeadsFrom = Literal["first", "second"]


@dataclass(frozen=True)
class Place:
    """What is known of a layer beside its factors: the multiplied side, its number of blocks, its name in patterns."""

    side: Side
    blocks: int
    pattern_name: str


BIASES = ("none", "lorma_only", "all")
"""From the fewest to the most biases that are trained."""
Places = dict[str, tuple[Place, Place]]
"""For each layer what the first and the second adapter make of it."""


def compose(
    first: Path, second: Path, output: Path, *, base: Base | None = None, heads_from: HeadsFrom | None = None
) -> AdapterFile:
    """Write the adapter that equals ``first`` and then ``second`` (``first`` acts on W0 first).

    Args:
        first, second: adapter folders.
        output: folder to write; one that exists is replaced if it holds nothing but an adapter.
        base: the base model, of which only the configuration is read; None does without where that is possible.
        heads_from: whose heads and biases to keep where both adapters have trained the same ones differently.

    Returns:
        The new adapter, as it is read back from ``output``.

    Raises:
        InputError: an adapter that cannot be read or is no LoRMA₊ adapter, two that do not fit each other, a
            question that needs ``base``, or an output that cannot be written or holds anything else.
    """
    check_output(output, True, first, second, kind=ADAPTER)
    one, two = read_adapter(first), read_adapter(second)
    for adapter in (one, two):
        _check_kind(adapter)
    _check_pair(one, two, base)
    _check_whole(one, two)
    _check_whole(two, one)
    tokens_of = _tokens_of(one, two, heads_from)
    others = _others(one, two, tokens_of, heads_from)
    places = _places_in(base, one, two) if base is not None else None
    try:
        tensors, ranks = _products(one, two, places)
    except ValueError as error:
        raise InputError(one_line(error)) from None
    config = _config(one, two, places, ranks, tokens_of)
    if base is not None and config.trainable_token_indices:
        _adapted(base, two, config)  # refuses tokens of a weight that is tied to an adapted one

    def fill(folder: Path) -> None:
        folder.mkdir()
        save_file(tensors | others, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(str(folder))
        for adapter in (one, two) if heads_from == "first" else (two, one):
            if copy_json(adapter.folder, META_FILE, folder):
                break

    write_folder(output, fill)
    return read_adapter(output)


def _check_kind(adapter: AdapterFile) -> None:
    config: Any = adapter.config
    if adapter.method == "TLORA":
        raise InputError(
            f"{adapter.folder} is a TLoRA adapter, which adds α·ABC: a sum of two such updates is no TLoRA again, as "
            "its fixed A and C are other ones; only LoRMA adapters with inflation='plus' can be composed"
        )
    if not isinstance(config, LormaConfig) or config.inflation != "plus":
        what = f"inflation={config.inflation!r}" if isinstance(config, LormaConfig) else f"a {adapter.method} adapter"
        raise InputError(
            f"{adapter.folder} has {what}; only LoRMA adapters with inflation='plus' are closed under products of low "
            "rank and can be composed"
        )
    if config.use_dora:
        raise InputError(f"{adapter.folder} has use_dora=True, which is no product of low rank and cannot be composed")


def _check_pair(one: AdapterFile, two: AdapterFile, base: Base | None) -> None:
    a, b = (adapter.config for adapter in (one, two))
    keys = ["task_type", "fused_projections", "target_parameters", "ensure_weight_tying"]
    bases = [name for name in (a.base_model_name_or_path, b.base_model_name_or_path) if name]
    if base is None and len({_place_of(name) for name in bases}) > 1:
        keys.insert(0, "base_model_name_or_path")
    for key in keys:
        ours, theirs = getattr(a, key) or None, getattr(b, key) or None
        if ours != theirs:
            raise InputError(
                f"{one.folder} and {two.folder} differ in {key} ({ours!r} and {theirs!r}); only adapters of one base "
                "model, task and kind can be composed"
            )


def _place_of(name: str) -> str:
    """The directory that a base model's name leads to, in full; a hub name as it is."""
    try:
        path = Path(name).expanduser()
        return str(path.resolve()) if path.is_dir() else name
    except (OSError, ValueError, RuntimeError):  # too long for a path, a zero byte, an unknown user
        return name


def _check_whole(adapting: AdapterFile, whole: AdapterFile) -> None:
    """Refuse layers of one adapter in modules that the other has trained whole; names match as PEFT matches them."""
    names = tuple(whole.config.modules_to_save or ())  # type: ignore[attr-defined]
    tokens = {name.removeprefix(PREFIX) for name in whole.tensors if name.endswith(DELTA)}
    for name in adapting.modules("lorma_A"):
        layer = name.removeprefix(PREFIX).replace(".base_layer", "")
        outer = itertools.accumulate(layer.split("."), "{}.{}".format)
        if f"{layer}.{DELTA}" in tokens:
            raise InputError(
                f"{adapting.folder} adapts {layer}, of which {whole.folder} has trained tokens "
                "(trainable_token_indices); one adapter cannot do both"
            )
        if names and any(path.endswith(names) for path in outer):
            raise InputError(
                f"{adapting.folder} adapts {layer}, which {whole.folder} has trained whole (modules_to_save); one "
                "adapter cannot do both"
            )


def _tokens_of(one: AdapterFile, two: AdapterFile, heads_from: HeadsFrom | None) -> AdapterFile:
    """The adapter whose trained tokens are kept: the only one that has any, or of two with the same the second."""
    first, second = (getattr(adapter.config, "trainable_token_indices", None) for adapter in (one, two))
    if first and second and first != second and heads_from is None:
        raise InputError(
            "both adapters have trained tokens (trainable_token_indices), and other ones; say whose to keep "
            "(--heads-from first or second)"
        )
    return one if not second or (first and heads_from == "first") else two


def _others(
    one: AdapterFile, two: AdapterFile, tokens_of: AdapterFile, heads_from: HeadsFrom | None
) -> dict[str, Tensor]:
    """Weights that are trained whole: one adapter's, or of both if they are the same."""
    same = one.config.trainable_token_indices == two.config.trainable_token_indices  # type: ignore[attr-defined]
    found: dict[str, Tensor] = {}
    order = (two, one) if heads_from == "first" else (one, two)
    for adapter in order:
        for name in adapter.tensors:
            if part_of(name) in LormaConfig.weight_names:
                continue
            if name.endswith(DELTA) and not same and adapter is not tokens_of:
                continue
            tensor = adapter.read(name)
            if heads_from is None and name in found and not torch.equal(found[name], tensor):
                raise InputError(
                    f"both adapters have trained {name.removeprefix(PREFIX)} whole, and differently; say whose to keep "
                    "(--heads-from first or second)"
                )
            found[name] = tensor
    return found


def _products(one: AdapterFile, two: AdapterFile, places: Places | None) -> tuple[dict[str, Tensor], dict[str, int]]:
    first, second = ({layer.name: layer for layer in layers_of(adapter)} for adapter in (one, two))
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name in dict.fromkeys([*first, *second]):
        present = [layers[name] for layers in (first, second) if name in layers]
        place = _place(name, present, one, two, places)
        if len({layer.A.shape[1] for layer in present}) > 1:
            raise InputError(
                f"{name}: the factors are {' and '.join(str(layer.A.shape[1]) for layer in present)} wide, so the "
                "adapters multiply different sides or belong to different base models"
            )
        rank = sum(len(layer.A) for layer in present)
        if rank > max(present[0].A.shape[1], WIDE_RANK):
            raise InputError(
                f"{name}: the product would have rank {rank}; allowed: the factors' width, {present[0].A.shape[1]}, or "
                f"{WIDE_RANK}"
            )
        dtype = max((layer.A.dtype for layer in present), key=lambda dtype: dtype.itemsize)
        A = torch.zeros(rank, present[0].A.shape[1], dtype=dtype)
        B = torch.zeros(A.shape[::-1], dtype=dtype)
        parts = [parts_of(layer, place.side, place.blocks) for layer in present]
        scalings = [layer.scaling for layer in present]
        if places is not None:  # which knows the names that patterns go by
            both = zip((one, two), places[name], (first, second), strict=True)
            scalings = [
                scaling_of(adapter.config, known.pattern_name, len(layers[name].A))  # type: ignore[arg-type]
                for adapter, known, layers in both
                if name in layers
            ]
        for index, (a, b) in enumerate(split_factors(A, B, present[0].fused, place.side, place.blocks)):
            factors = [(*part[index], s) for part, s in zip(parts, scalings, strict=True)]
            wide = [(x.double(), y.double(), s) for x, y, s in factors]
            new_a, new_b = functional.compose_all(wide, place.side)
            a.copy_(new_a)
            b.copy_(new_b)
        path = f"{PREFIX}{name}"
        tensors[f"{path}.lorma_A"], tensors[f"{path}.lorma_B"] = A, B
        ranks[place.pattern_name] = rank
    return tensors, ranks


def _place(name: str, present: list[LayerFile], one: AdapterFile, two: AdapterFile, places: Places | None) -> Place:
    configs: list[Any] = [one.config, two.config]
    if places is not None and name not in places:
        raise InputError(f"the adapters do not fit the base model: the base model has no layer {name}")
    if places is not None:
        first, second = places[name]
        if first.side != second.side:
            raise InputError(f"{name}: the first adapter multiplies side {first.side}, the second {second.side}")
        return first
    sides = {config.side for config in configs}
    hint = "name the base model (--base), whose structure tells"
    if "auto" in sides:
        raise InputError(f"side='auto': the files do not say which side of {name} is multiplied; {hint}")
    if len(sides) > 1:
        raise InputError(f"the first adapter has side={configs[0].side!r}, the second {configs[1].side!r}")
    if configs[0].ensure_weight_tying and configs[0].side != "post":
        raise InputError(f"the files do not say whether {name} is tied to an embedding; {hint}")
    if configs[0].target_parameters or ".base_layer" in name:
        raise InputError(f"the files do not say how many matrices {name} holds; {hint}")
    return Place(configs[0].side, 1, config_name(name, configs[0]))


def _places_in(base: Base, one: AdapterFile, two: AdapterFile) -> Places:
    """Side and blocks of every layer for both adapters, asked of the tuner itself on a model without weights."""
    found: list[dict[str, Place]] = []
    for adapter in (one, two):
        adapted = _adapted(base, adapter, adapter.config)
        layers = {path: m for path, m in adapted.named_modules() if isinstance(m, LormaLayer)}
        found.append(
            {
                path.removeprefix(PREFIX): Place(layer.side["default"], layer.blocks, layer.pattern_name)
                for path, layer in layers.items()
            }
        )
    first, second = found
    return {name: (first.get(name, second.get(name)), second.get(name, first.get(name))) for name in first | second}  # type: ignore[misc]


def _adapted(base: Base, adapter: AdapterFile, config: Any) -> Any:
    """The base model without weights, adapted; ``adapter`` is named if that is refused."""
    model = meta_model(base, str(config.task_type))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return get_peft_model(model, replace(config), low_cpu_mem_usage=True)
    except (ValueError, TypeError) as error:
        raise InputError(one_line(f"{adapter.folder} does not fit the base model: {error}")) from None


def _config(
    one: AdapterFile,
    two: AdapterFile,
    places: Places | None,
    ranks: dict[str, int],
    tokens_of: AdapterFile,
) -> LormaConfig:
    a: Any = one.config
    b: Any = two.config
    resolved = {first.side for first, _ in (places or {}).values()}
    if a.side != b.side and len(resolved) > 1:
        raise InputError(
            f"the first adapter has side={a.side!r}, the second {b.side!r}: together they multiply some layers on side "
            "pre and others on side post, which one configuration cannot say"
        )
    side = a.side if a.side == b.side else resolved.pop()
    heads = sorted({*(a.modules_to_save or ()), *(b.modules_to_save or ())})
    parameters = [name.rpartition(".")[2] for name in a.target_parameters or ()]
    modules = [name for name in ranks if name.rpartition(".")[2] not in parameters]
    config: LormaConfig = replace(
        layerwise_config(a, modules, ranks),
        side=side,
        modules_to_save=heads or None,
        trainable_token_indices=tokens_of.config.trainable_token_indices,  # type: ignore[attr-defined]
        lorma_dropout=0.0,
        bias=max((a.bias, b.bias), key=BIASES.index),
        base_model_name_or_path=a.base_model_name_or_path or b.base_model_name_or_path,
    )
    return config
