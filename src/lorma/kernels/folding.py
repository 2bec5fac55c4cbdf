"""A folded weight that is used again while nothing it was made of has changed."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

_steps = 0
"""How many optimiser steps this process has made. Fused optimisers do not raise the version of what they write to."""


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


class FoldedWeight:
    """Holds ``I(BA)·W0`` between forward passes, for the micro-batches of one optimiser step.

    A change of W0, A, B or s is known by the identity and version of the tensors and by the steps of optimisers, which
    may pass versions by. On a CPU A and B are compared with copies besides (2·r·n numbers); elsewhere that would make
    the host wait. So a write by hand through ``W0.data``, or off the CPU through ``A.data``, goes unnoticed until the
    layer is switched to ``train()`` or ``eval()``. A copy or a pickle is empty.
    """

    def __init__(self) -> None:
        self._held: tuple[Tensor, list[weakref.ref[Tensor]], tuple[Any, ...], list[Tensor]] | None = None

    def look_up(self, weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor | None:
        """The folded weight, or None if something has changed."""
        if self._held is None:
            return None
        folded, references, state, copies = self._held
        same = all(known() is t for known, t in zip(references, (weight, A, B), strict=True))
        if not same or state != _state(weight, A, B, scaling):
            return None
        return folded if all(torch.equal(new, old) for new, old in zip((A, B), copies, strict=False)) else None

    def keep(self, folded: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> None:
        """Hold what was made of these tensors as they are now."""
        references = [weakref.ref(t) for t in (weight, A, B)]
        copies = [t.detach().clone() for t in (A, B)] if A.device.type == "cpu" else []
        self._held = folded, references, _state(weight, A, B, scaling), copies

    def clear(self) -> None:
        """Let go of the folded weight."""
        self._held = None

    def __reduce__(self) -> tuple[type[FoldedWeight], tuple[()]]:
        return FoldedWeight, ()


def _state(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> tuple[Any, ...]:
    return (*((t.data_ptr(), t._version) for t in (weight, A, B)), scaling, _steps)
