"""``nn.TransformerEncoder`` in evaluation reads weights past the layers that wrap them, unless told not to."""

from __future__ import annotations

from typing import Any

from torch import nn

from lorma.tuners.layer import AdapterLayer

_SWITCHES = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
"""What chooses a fast path: fused weights in a layer, and in a stack padded input as nested tensors."""


def leave_fast_paths(model: nn.Module) -> None:
    """Have every encoder in ``model`` that holds an adapter take its ordinary path."""
    for module in model.modules():
        for kind, (name, off) in _SWITCHES.items():
            if isinstance(module, kind) and getattr(module, name, off) != off and _is_adapted(module):
                vars(module).setdefault("_before_adapters", {})[name] = getattr(module, name)
                setattr(module, name, off)


def return_to_fast_paths(model: nn.Module) -> None:
    """Undo :func:`leave_fast_paths` where no adapter is left."""
    for module in model.modules():
        if "_before_adapters" in vars(module) and not _is_adapted(module):
            for name, value in vars(module).pop("_before_adapters").items():
                setattr(module, name, value)


def _is_adapted(module: Any) -> bool:
    return any(isinstance(part, AdapterLayer) for part in module.modules())
