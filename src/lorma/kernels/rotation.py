"""Iπ(BA) and its gradient by blocks of rows, so that nothing larger than the n × n result is made.

Row i of P = BA is rotated right by i. For the c rows from i0 to i1 − 1 only w = n + c columns of [P P] are needed,
those from n − i1: element (t, j) of the rotated block lies in them at flat position ``c + t·(w − 1) + j``. The gradient
goes the other way: a block D of rows of ∂L/∂M, its columns started at i0 and its first c columns repeated at the end,
holds the block of U = (D rotated back) at ``t·(w + 1) + j``; then ``dB = s·U·Aᵀ`` and ``dA = s·Bᵀ·U``. Both views go
into a matrix product as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from lorma.kernels.form import Operands

_ROWS = 512


def row_blocks(n: int) -> Iterator[tuple[int, int]]:
    """Starts and ends of blocks of rows: a few for a large n, all of about one size and none of them small."""
    count = min(-(-n // _ROWS), 8)
    step = -(-n // count)
    return ((start, min(start + step, n)) for start in range(0, n, step))


def rotated_rows(o: Operands, dtype: torch.dtype) -> Callable[[int, int], Tensor]:
    """A function that gives rows i0 … i1 − 1 of ``s·Iπ(BA)`` (LoRMA paper, eq. 7) as a view, formed in ``dtype``."""
    n = o.A.shape[-1]
    doubled = torch.cat((o.A, o.A), dim=-1).to(dtype)
    scaled = (o.B * o.scaling).to(dtype)

    def block(start: int, stop: int) -> Tensor:
        product = scaled[start:stop] @ doubled[:, n - stop : 2 * n - start]
        count, width = product.shape
        return product.as_strided((count, n), (width - 1, 1), count)

    return block


def rotated_matrix(o: Operands, *, apart: bool = False) -> Tensor:
    """``s·Iπ(BA)``, or with ``apart`` what is left of it without the identity, n × n.

    It is formed in the precision of the factors and rounded once, so that a small update is whole when it is rounded.
    """
    n = o.A.shape[-1]
    result = o.A.new_empty((n, n), dtype=o.dtype)
    block = rotated_rows(o, torch.promote_types(o.A.dtype, o.dtype))
    for start, stop in row_blocks(n):
        piece = block(start, stop)
        if apart:
            piece = piece.contiguous()
            piece.diagonal(start).sub_(1)
        result[start:stop] = piece
    return result


def factor_gradients(o: Operands, gradient_rows: Callable[[int, int], Tensor]) -> tuple[Tensor, Tensor]:
    """``dA`` (r × n) and ``dB`` (n × r) from ∂L/∂(s·Iπ(BA)).

    Args:
        gradient_rows: gives rows i0 … i1 − 1 of that gradient (c × n).
    """
    n = o.A.shape[-1]
    A, B = o.A.to(o.dtype), o.B.to(o.dtype)
    dA, parts = A.new_zeros(A.shape, dtype=torch.promote_types(o.A.dtype, o.dtype)), []
    for start, stop in row_blocks(n):
        gradient = gradient_rows(start, stop)
        count = stop - start
        turned = torch.cat((gradient[:, start:], gradient[:, :stop]), dim=-1)
        back = turned.as_strided((count, n), (n + count + 1, 1))
        parts.append(F.linear(back, A))
        dA += B[start:stop].mT @ back
    return dA * o.scaling, torch.cat(parts) * o.scaling
