"""What is installed and what of it can be used here, and whether an adapter is in good health. Loads no model."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from lorma import functional
from lorma._version import __version__
from lorma.adapters.folder import AdapterFile, part_of, read_adapter
from lorma.adapters.kinds import kind_of, rank_dimensions
from lorma.errors import InputError
from lorma.functional.multiplier import Side
from lorma.methods.lorma.tuner import LormaConfig
from lorma.methods.lorma.tuner.files import LayerFile, layers_of, parts_of
from lorma.tuners.names import PREFIX

REQUIRED = ("torch", "transformers", "peft", "accelerate", "safetensors", "datasets")
OPTIONAL = ("bitsandbytes", "torchao", "triton", "gguf", "llama_cpp_python", "trl", "deepspeed")
WIDEST = 1024
"""Width up to which matrices are decomposed to judge a multiplier: 2r (at most n) for ``plus``, n for the others. 0.3
seconds on one core."""
SINGULAR = 1e12
"""Condition number from which a multiplier counts as singular: in float64 four digits are left."""


@dataclass(frozen=True)
class LayerHealth:
    """One adapted layer.

    Attributes:
        name: its path in the base model.
        rank: of its factors; None for a method whose weights do not show it.
        shapes: of its weights, in the order of their names.
        dtype: of its weights.
        finite: whether all their numbers are.
        condition: condition number of its multiplier, of its worst slice; None if unknown.
    """

    name: str
    rank: int | None
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    finite: bool
    condition: float | None


@dataclass(frozen=True)
class AdapterHealth:
    """What can be told of an adapter from its folder.

    Attributes:
        method: a line that says what it is.
        base: the base model it names.
        lora: whether it is a plain LoRA in other words, and if not, why.
        others: names of weights that are trained whole (heads, biases).
        faults: what makes it unusable, one line each; empty if it is healthy.
    """

    method: str
    base: str
    lora: str
    layers: list[LayerHealth] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def environment() -> dict[str, str]:
    """Versions of what lorma uses, devices, and what they allow."""
    found = {"lorma": __version__, "python": f"{platform.python_version()} on {platform.platform()}"}
    found |= {name: _version(name) or "missing" for name in REQUIRED}
    found |= {name: known for name in OPTIONAL if (known := _version(name))}
    found["not installed"] = ", ".join(name for name in OPTIONAL if not _version(name)) or "nothing"
    return found | _devices() | _abilities()


def examine(folder: Path) -> AdapterHealth:
    """Look an adapter folder through, tensor by tensor.

    Raises:
        InputError: the folder cannot be read; see :func:`lorma.adapters.folder.read_adapter`.
    """
    adapter = read_adapter(folder)
    config: Any = adapter.config
    kind = kind_of(config)
    health = AdapterHealth(
        kind.summary(config) or adapter.method, config.base_model_name_or_path or "not named", _lora(adapter)
    )
    own = {name for name in adapter.tensors if _is_own(adapter, name)}
    health.others.extend(name.removeprefix(PREFIX) for name in adapter.tensors if name not in own)
    if isinstance(config, LormaConfig):
        try:
            health.layers.extend(_lorma_layer(adapter, layer) for layer in layers_of(adapter))
        except ValueError as error:
            raise InputError(str(error)) from None
    else:
        health.layers.extend(_any_layers(adapter, own))
    for layer in health.layers:
        if not layer.finite:
            health.faults.append(f"{layer.name} holds NaN or infinity")
        elif layer.condition is not None and layer.condition > SINGULAR and config.inflation != "none":
            health.faults.append(f"the multiplier of {layer.name} is singular (condition number {layer.condition:.1e})")
    for name in health.others:
        tensor = adapter.read(next(n for n in adapter.tensors if n.removeprefix(PREFIX) == name))
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            health.faults.append(f"{name} holds NaN or infinity")
    return health


def _lorma_layer(adapter: AdapterFile, layer: LayerFile) -> LayerHealth:
    finite = bool(torch.isfinite(layer.A).all() and torch.isfinite(layer.B).all())
    return LayerHealth(
        layer.name,
        layer.A.shape[0],
        (tuple(layer.A.shape), tuple(layer.B.shape)),
        _name_of(layer.A.dtype),
        finite,
        _condition(adapter.config, layer) if finite else None,
    )


def _condition(config: Any, layer: LayerFile) -> float | None:
    """Of the worst slice. Experts and groups are not to be seen in the file; they are taken together as one."""
    side: Side = "post" if config.side == "post" else "pre"
    try:
        parts = parts_of(layer, side)
    except ValueError:  # side="auto" and slices of different widths: what was chosen is not in the file
        return None
    if config.target_parameters and config.alpha_pattern:  # patterns know experts by names that the file does not say
        return None
    plus = config.inflation == "plus"
    if max(min(A.shape[-1], 2 * A.shape[-2]) if plus else A.shape[-1] for A, _ in parts) > WIDEST:
        return None
    numbers = [functional.condition_number(A.double(), B.double(), layer.scaling, config.inflation) for A, B in parts]
    return max(float(number) for number in numbers)


def _is_own(adapter: AdapterFile, name: str) -> bool:
    """Whether a weight is the method's own; PEFT has them begin with the method's name."""
    part = part_of(name)
    return part in rank_dimensions() or part.startswith(f"{adapter.method.lower()}_")


def _any_layers(adapter: AdapterFile, own: set[str]) -> list[LayerHealth]:
    layers: dict[str, list[str]] = {}
    dimensions = rank_dimensions()
    for name in own:
        layers.setdefault(name.removesuffix(".weight").rpartition(".")[0], []).append(name)
    found = []
    for path, names in sorted(layers.items()):
        tensors: list[Tensor] = [adapter.read(name) for name in sorted(names)]
        part, shape = part_of(sorted(names)[0]), tuple(tensors[0].shape)
        rank = shape[dimensions[part]] if dimensions.get(part, len(shape)) < len(shape) else None
        finite = all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        found.append(LayerHealth(path.removeprefix(PREFIX), rank, shapes, _name_of(tensors[0].dtype), finite, None))
    return found


def _lora(adapter: AdapterFile) -> str:
    """Whether an adapter leaves as plain LoRA, in words."""
    reason = kind_of(adapter.config).not_lora(adapter.config)
    if reason is None:
        return "yes, exactly"
    return f"not known for {adapter.method}" if reason == "not known" else reason


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> dict[str, str]:
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    cores, threads = (
        f"{count} {name}{'s' * (count != 1)}"
        for count, name in ((psutil.cpu_count(logical=False), "core"), (torch.get_num_threads(), "thread"))
    )
    found = {"cpu": f"{cores}, {threads} used, {memory}"}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        props = torch.cuda.get_device_properties(index)
        capability = f"{props.major}.{props.minor}"
        found[f"cuda:{index}"] = f"{props.name}, {props.total_memory / 2**30:.0f} GiB, compute capability {capability}"
    if torch.backends.mps.is_available():
        found["mps"] = "available"
    return found


def _abilities() -> dict[str, str]:
    cuda = torch.cuda.is_available()
    quantised = "nf4 and int8 (bitsandbytes)" if find_spec("bitsandbytes") else 'no: pip install "lorma[quant]"'
    bf16 = torch.cuda.is_bf16_supported() if cuda else "avx512_bf16" in _cpu_flags() or "amx_bf16" in _cpu_flags()
    triton = "with LORMA_TRITON=1" if cuda and find_spec("triton") else "no: it needs a GPU and Triton"
    return {
        "quantised bases": quantised,
        "bfloat16 in hardware": "yes" if bf16 else "no, slower than float32",
        "Triton kernels": triton,
        "GGUF bases": "yes" if find_spec("gguf") else 'no: pip install "lorma[gguf]"',
    }


def _cpu_flags() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
