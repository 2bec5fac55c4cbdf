"""Cache of a tensor derived from (W0, A, B, s), invalidated when any of them changes."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from lorma.functional.multiplier import Scaling

_steps = 0
"""How many optimiser steps this process has made. Fused optimisers do not raise the version of what they write to."""


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


class TensorCache:
    """Keeps a tensor derived from W0, A, B and s between forward passes: a folded weight, DoRA's norms.

    A change is known by the identity, memory and version of the tensors and by the steps of optimisers, which may pass
    versions by. On a CPU A and B are compared with copies besides (2·r·n numbers); elsewhere that would make the host
    wait. So a write by hand through ``W0.data``, or off the CPU through ``A.data``, goes unnoticed until the layer is
    switched to ``train()`` or ``eval()``. A copy or a pickle is empty.
    """

    def __init__(self) -> None:
        self._cached: tuple[Tensor, list[weakref.ref[Tensor]], list[Any], list[Tensor]] | None = None

    def look_up(self, weight: Tensor, A: Tensor, B: Tensor, scaling: Scaling) -> Tensor | None:
        """The cached tensor, or None if something has changed."""
        if self._cached is None:
            return None
        result, references, state, copies = self._cached
        same = all(known() is t for known, t in zip(references, (weight, A, B), strict=True))
        if not same or state != _state(weight, A, B, scaling):
            return None
        return result if all(torch.equal(new, old) for new, old in zip((A, B), copies, strict=False)) else None

    def keep(self, result: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: Scaling) -> None:
        """Cache what was derived from these tensors; nothing if they do not tell when they are changed."""
        self._cached = None
        if not any(t.is_inference() for t in (weight, A, B)):
            references = [weakref.ref(t) for t in (weight, A, B)]
            copies = [t.detach().clone() for t in (A, B)] if A.device.type == "cpu" else []
            self._cached = result, references, _state(weight, A, B, scaling), copies

    def clear(self) -> None:
        """Empty the cache."""
        self._cached = None

    def __reduce__(self) -> tuple[type[TensorCache], tuple[()]]:
        return TensorCache, ()


def _state(weight: Tensor, A: Tensor, B: Tensor, scaling: Scaling) -> list[Any]:
    tensors = [t for t in (weight, A, B, scaling) if isinstance(t, Tensor)]
    return [_steps, None if isinstance(scaling, Tensor) else scaling, *map(_identity, tensors)]


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    # Tensors of other classes (quantised, sharded) may have no one address.
    place = tensor.data_ptr() if type(tensor) in (Tensor, nn.Parameter) else id(tensor)
    return place, tensor.device, tensor.dtype, None if tensor.is_inference() else tensor._version
