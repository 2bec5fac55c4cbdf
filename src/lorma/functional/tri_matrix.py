"""TLoRA (arXiv 2504.18735): a weight updated by three matrices, of which only the middle one is trained.

``W = W0 + α·(A·B·C)ᵀ`` for W0 of shape d × k, i.e. ``out = x·W0ᵀ + α·x·A·B·C``, with A (k × r) and C (r × d) fixed and
random, B (r × r) and the scalar α trained. The start is B = 0, α = 1: the base model exactly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lorma.functional.projection import standard_normal


def draw_projections(seed: int, name: str, d: int, k: int, r: int) -> tuple[Tensor, Tensor]:
    """The fixed matrices A (k × r) and C (r × d) of the weight called ``name``, float32 on the CPU.

    Normal with standard deviation ``√(2/6)/√fan_in`` (Kaiming with a = √5), where fan_in is the last dimension: r for A
    and d for C, as in the paper's experiments. The numbers depend on the arguments alone; see
    :mod:`lorma.functional.projection`.
    """
    A = standard_normal(seed, name, (k, r), "A") * (math.sqrt(1 / 3) / math.sqrt(r))
    C = standard_normal(seed, name, (r, d), "C") * (math.sqrt(1 / 3) / math.sqrt(d))
    return A.to(torch.float32), C.to(torch.float32)


def check_matrices(A: Tensor, B: Tensor, C: Tensor) -> None:
    """Raise ``ValueError`` unless A is (k × r), B (r × r) and C (r × d)."""
    r = B.shape[-1]
    if A.ndim != 2 or C.ndim != 2 or B.shape != (r, r) or A.shape[1] != r or C.shape[0] != r:
        raise ValueError(
            f"A must have shape (k, r), B (r, r) and C (r, d); got A {tuple(A.shape)}, B {tuple(B.shape)} and C "
            f"{tuple(C.shape)}"
        )


def tri_matrix_update(x: Tensor, A: Tensor, B: Tensor, C: Tensor, alpha: Tensor) -> Tensor:
    """``α·x·A·B·C`` for every row of x (…, k); returns (…, d). Differentiable in x, B and α."""
    check_matrices(A, B, C)
    return ((x @ A) @ (alpha * B)) @ C


def tri_matrix_delta(A: Tensor, B: Tensor, C: Tensor, alpha: Tensor) -> Tensor:
    """``ΔW = α·(A·B·C)ᵀ``, d × k."""
    up, down = tri_matrix_lora_form(A, B, C, alpha)[::-1]
    return up @ down


def tri_matrix_lora_form(A: Tensor, B: Tensor, C: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """TLoRA as a LoRA of the same rank and of scaling 1, exactly: ``A' = Aᵀ`` (r × k), ``B' = α·Cᵀ·Bᵀ`` (d × r)."""
    check_matrices(A, B, C)
    return A.mT, C.mT @ (alpha * B).mT
