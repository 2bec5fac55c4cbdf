"""Which modules can be adapted, and what is refused."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

from peft.utils.other import get_pattern_key
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from lorma.tuners.quantized import quantization_backend

MAMBA_MODEL_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
MAMBA_FUSED_MODULES = ("out_proj", "conv1d")
Kinds = Mapping[type[nn.Module], Any]
"""The adapter layer for each class of modules."""


def layer_class(kinds: Kinds, target: nn.Module, name: str) -> Any:
    """The adapter layer for a module; quantised linear layers have that of ``nn.Linear``.

    Raises:
        ValueError: if there is none, with the reason.
    """
    if isinstance(target, NonDynamicallyQuantizableLinear):
        raise ValueError(
            f"Target module {name} is not supported: nn.MultiheadAttention reads this weight without calling the "
            "module; target the attention itself"
        )
    for kind, cls in kinds.items():
        if isinstance(target, kind):
            if isinstance(target, nn.Embedding) and target.max_norm is not None:
                raise ValueError(
                    f"Target module {name} is not supported: an nn.Embedding with max_norm changes its weight when read"
                )
            return cls
    backend = quantization_backend(target)
    if backend is not None and backend.layer_type == "linear":
        return kinds[nn.Linear]
    raise ValueError(
        f"Target module {name} ({type(target).__name__}) is not supported. Currently, only the following modules are "
        f"supported: {', '.join(f'`{kind.__module__}.{kind.__name__}`' for kind in kinds)} and quantised linear layers."
    )


def from_pattern(pattern: dict[str, Any], name: str, default: Any) -> Any:
    """What a ``rank_pattern`` or ``alpha_pattern`` says about one module."""
    return pattern.get(get_pattern_key(list(pattern), name), default)


def patterns(field: str, values: dict[str, Any]) -> dict[str, Any]:
    """``{field: …}`` that gives each module, by its name, a value of its own.

    Where modules differ all are named, the longest name first: a name also matches where another ends in it.
    """
    if len(set(values.values())) < 2:
        return {field: {}}
    return {field: {re.escape(name): values[name] for name in sorted(values, key=len, reverse=True)}}


def check_fan_in_fan_out(config: Any, target: nn.Module, name: str) -> None:
    """Warn where ``fan_in_fan_out`` says what the module is not."""
    if config.fan_in_fan_out and not isinstance(target, Conv1D):
        warnings.warn(
            f"fan_in_fan_out is set to True but {name} is a {type(target).__name__}, which stores its weight as "
            "out x in; it is ignored there.",
            stacklevel=2,
        )


def check_mamba(method: str, model: nn.Module, target_name: str) -> None:
    """Refuse what Mamba's fused kernels read without calling (``ValueError``)."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in MAMBA_MODEL_TYPES and target_name in MAMBA_FUSED_MODULES:
        raise ValueError(
            f"[PEFT:{method}] Module '{target_name}' is incompatible with Mamba-based models "
            f"(model_type='{model_type}'): its weight is read without calling it. "
            "Please remove it from `target_modules`."
        )
