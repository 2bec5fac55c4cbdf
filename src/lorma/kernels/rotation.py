"""Iπ(BA) and its gradient by blocks of rows, each used up in the matrix products it is needed for.

Row i of P = BA is rotated right by i. For the c rows from i0 to i1 − 1 only w = n + c columns of [P P] are needed,
those from n − i1: element (t, j) of the rotated block lies in them at flat position ``c + t·(w − 1) + j``. The gradient
goes the other way: a block D of rows of ∂L/∂M with its first i1 columns repeated at the end, w = n + i1, holds that of
U = (D rotated back) at ``i0 + t·(w + 1) + j``; then ``dB = s·U·Aᵀ`` and ``dA = s·Bᵀ·U``. Both views go into a matrix
product as they are.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from lorma.kernels.form import Operands, in_dtype

_ROWS = 512
_work_space = threading.local()


def row_blocks(n: int) -> Iterator[tuple[int, int]]:
    """Starts and ends of blocks of rows: a few for a large n, all of about one size and none of them small."""
    count = min(-(-n // _ROWS), 8)
    step = -(-n // count)
    return ((start, min(start + step, n)) for start in range(0, n, step))


def drop_work_space() -> None:
    """Let go of the memory that this thread holds for blocks (two of at most 512 × 2n numbers, or n/8 × 2n)."""
    vars(_work_space).clear()


def _room(name: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised matrix; on a CPU always the same memory for a name, in each thread.

    A new block of a few MB costs a CPU as much in page faults as the product that fills it. GPUs have an allocator
    that hands memory out again.
    """
    if device.type != "cpu":
        return torch.empty(rows, columns, dtype=dtype, device=device)
    held: Tensor | None = getattr(_work_space, name, None)
    if held is None or held.dtype != dtype or held.numel() < rows * columns:
        with torch.inference_mode(False):
            held = torch.empty(rows * columns, dtype=dtype, device=device)
        setattr(_work_space, name, held)
    return held.as_strided((rows, columns), (columns, 1))


def multiplier_blocks(o: Operands, *, apart: bool = False) -> Iterator[tuple[slice, Tensor]]:
    """``s·Iπ(BA)`` (LoRMA paper, eq. 7), or with ``apart`` what is left of it without the identity.

    It is formed in the precision of the factors and rounded once, so that a small update is whole when it is rounded.

    Yields:
        Which rows, and those rows (c × n) in the dtype of the computation: a view of work space, ``n + c − 1`` numbers
        from row to row, that holds until the next block is asked for.
    """
    n, precise = o.A.shape[-1], torch.promote_types(o.A.dtype, o.dtype)
    A, B = in_dtype(o.A, precise), in_dtype(o.B, precise)
    doubled = torch.cat((A, A), dim=-1)
    for start, stop in row_blocks(n):
        count = stop - start
        product = _room("multiplier", count, n + count, precise, doubled.device)
        part = doubled[:, n - stop : 2 * n - start]
        torch.addmm(product, B[start:stop], part, beta=0, alpha=o.scaling, out=product)
        rows = product.as_strided((count, n), (n + count - 1, 1), count)
        if apart:
            rows.diagonal(start).sub_(1)
        yield slice(start, stop), in_dtype(rows, o.dtype)


def factor_gradients(
    o: Operands, left: Tensor, right: Tensor, less: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """``dA`` (r × n) and ``dB`` (n × r) from ∂L/∂(s·Iπ(BA)), given as a product.

    Args:
        o: the operands.
        left: n × K, the left factor of that gradient.
        right: K × n, the right one.
        less: two vectors of n whose outer product is taken from it.
    """
    n = o.A.shape[-1]
    A, B = in_dtype(o.A, o.dtype), in_dtype(o.B, o.dtype)
    dA, parts = None, []
    for start, stop in row_blocks(n):
        count = stop - start
        turned = _room("gradient", count, n + stop, o.dtype, left.device)
        gradient = torch.mm(left[start:stop], right, out=turned[:, :n])
        if less is not None:
            gradient.addr_(less[0][start:stop], less[1], alpha=-1)
        turned[:, n:] = gradient[:, :stop]
        back = turned.as_strided((count, n), (n + stop + 1, 1), start)
        parts.append(F.linear(back, A))
        part = in_dtype(B[start:stop].mT @ back, torch.promote_types(o.A.dtype, o.dtype))
        dA = part if dA is None else dA.add_(part)
    dB = parts[0] if len(parts) == 1 else torch.cat(parts)
    return cast(Tensor, dA) * o.scaling, dB * o.scaling
