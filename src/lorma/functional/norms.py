"""Row norms of a multiplied weight without forming it: what DoRA's magnitude needs on top of LoRMA₊."""

from __future__ import annotations

import torch
from torch import Tensor

from lorma.functional.multiplier import Scaling, Side, check_factors, check_fits, widen

ROWS_AT_A_TIME = 1024


def multiplied_row_norms(weight: Tensor, A: Tensor, B: Tensor, scaling: Scaling, side: Side = "pre") -> Tensor:
    """Euclidean norm of every row of ``(I + s·BA)·W0`` (``pre``) or ``W0·(I + s·BA)`` (``post``).

    With ``P = A·W0``, ``‖row i‖² = ‖W0_i‖² + 2s·((B ∘ W0Pᵀ)·1)_i + s²·((B·PPᵀ ∘ B)·1)_i`` for pre; with ``Q = W0·B``,
    ``‖W0_i‖² + 2s·((Q ∘ W0Aᵀ)·1)_i + s²·((Q·AAᵀ ∘ Q)·1)_i`` for post. Nothing of the size d × k is formed; a weight in
    low precision is widened a thousand rows at a time.

    Args:
        weight: W0, shape (…, d, k).
        A, B, scaling: the LoRMA₊ factors, n = d for ``pre`` and n = k for ``post``.
        side: which side the multiplier stands on.

    Returns:
        Shape (…, d), in at least float32.

    Raises:
        ValueError: if the shapes do not fit or ``side`` is unknown.
    """
    check_fits(weight, check_factors(A, B), side)
    A, B = widen(A), widen(B)
    dtype = torch.promote_types(widen(weight[..., :0, :]).dtype, A.dtype)
    starts = range(0, weight.shape[-2], weight.shape[-2] if weight.dtype == dtype else ROWS_AT_A_TIME)
    parts = [(i, weight[..., i : i + starts.step, :]) for i in starts]
    P = A
    if side == "pre":
        P = torch.stack([A[..., i : i + W.shape[-2]] @ W.to(dtype) for i, W in parts]).sum(0)
    gram = P @ P.mT
    squares = []
    for i, part in parts:
        W = part.to(dtype)
        left, right = (B[..., i : i + W.shape[-2], :] if side == "pre" else W @ B), W @ P.mT
        cross, quadratic = (left * right).sum(-1), ((left @ gram) * left).sum(-1)
        squares.append(torch.linalg.vecdot(W, W) + 2 * scaling * cross + scaling**2 * quadratic)
    return torch.cat(squares, dim=-1).clamp_min(0).sqrt()
