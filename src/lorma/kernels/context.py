"""What is going on around a call: tracing, function transforms, dispatch modes, autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_NOTHING = nullcontext()


def dispatch_mode_active() -> bool:
    """Whether a dispatch mode sees each operation and may keep what comes out of it (selective checkpointing does)."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def only_plain_operations() -> bool:
    """Whether something looks on that must see PyTorch's own operations: a transform, a tracer, forward-mode AD."""
    if torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None:
        return True
    if dispatch_mode_active() and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        return True
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def add_product(y: Tensor, left: Tensor, right: Tensor, scaling: float = 1.0) -> Tensor:
    """``y + s·left·right``, in the memory of ``y`` unless somebody looks on to whom that matters."""
    if only_plain_operations() or dispatch_mode_active():
        return torch.addmm(y, left, right, alpha=scaling)
    return y.addmm_(left, right, alpha=scaling)


def under_autocast(x: Tensor) -> bool:
    """Whether autocast is on where ``x`` is."""
    if not torch._C._is_any_autocast_enabled():
        return False
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """While active, products are computed in the dtype that they are given."""
    return torch.autocast(x.device.type, enabled=False) if under_autocast(x) else _NOTHING
