"""LoRMAπ by matrix products: multiply the activations, or fold the weight once and use it as a plain layer.

With M = s·Iπ(BA), n × n, m the other side of the weight and b tokens, beside a frozen layer (forward and dx) as 1:

* ``rotate`` multiplies activations z, whoever made them: ``out = M·(z − bias) + bias``. ``dz = g·M``,
  ``dM = gᵀ(z − bias)``: 1.5·n/m more. In less than float32 the identity is kept apart, ``out = z + (M − I)·(z −
  bias)``, because rounding I + ΔM to 8 bits loses a small ΔM.
* ``fold_pre`` and ``fold_post`` compute ``Wm = M·W0`` or ``W0·M`` and then ``x·Wmᵀ``. ``dx = g·Wm``, ``dM =
  (gᵀx)·W0ᵀ`` or ``W0ᵀ·(gᵀx)``: 0.5 + n/b more. Only in float32 and above, for the same reason. Wm is kept for the
  backward pass and may be used again while neither W0 nor the factors have changed.

``rotate`` keeps M for the backward pass only if there are so few tokens that forming it again would be felt. The
gradient of M is made and used up by blocks of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from lorma.kernels.circular import permuted
from lorma.kernels.form import Form, Gradients, Operands, as_rows, register
from lorma.kernels.rotation import factor_gradients, rotated_matrix, rotated_rows, row_blocks


def _is_apart(dtype: torch.dtype) -> bool:
    return dtype.itemsize < 4


def _keeps_multiplier(o: Operands) -> bool:
    return o.x.shape[:-1].numel() <= 64 * len(o.A)


def _rotate(o: Operands, _: Tensor | None) -> tuple[Tensor, Tensor]:
    apart = _is_apart(o.dtype)
    M = rotated_matrix(o, apart=apart)
    z, bias = o.rows, o.shift
    shift = None if bias is None else (0 if apart else bias) - M @ bias
    out = F.linear(z, M, shift)
    if apart:
        out += z
    return out, M if _keeps_multiplier(o) else M.new_empty(0)


def _rotate_backward(grad: Tensor, o: Operands, kept: Tensor, needs: Sequence[bool]) -> Gradients:
    g, z, bias = as_rows(grad), o.rows, o.shift
    total = None if bias is None else g.sum(0)
    dz = dbias = dA = dB = None
    if needs[0] or needs[1]:
        apart = _is_apart(o.dtype)
        M = kept if len(kept) else rotated_matrix(o, apart=apart)
        if needs[0]:
            dz = (torch.addmm(g, g, M) if apart else g @ M).view(o.x.shape)
        if needs[1] and total is not None:
            dbias = (0 if apart else total) - total @ M
        del M
    if needs[2] or needs[3]:

        def gradient_rows(start: int, stop: int) -> Tensor:
            found = g[:, start:stop].mT @ z
            return found if total is None or bias is None else found.addr_(total[start:stop], bias, alpha=-1)

        dA, dB = factor_gradients(o, gradient_rows)
    return dz, dbias, dA, dB


def folded_pre(o: Operands) -> Tensor:
    """``s·Iπ(BA)·W0`` (d × k), the multiplier never formed whole."""
    weight, block = o.base, rotated_rows(o, o.dtype)
    result = weight.new_empty(weight.shape)
    for start, stop in row_blocks(len(weight)):
        torch.mm(block(start, stop), weight, out=result[start:stop])
    return result


def folded_post(o: Operands) -> Tensor:
    """``W0·s·Iπ(BA)`` (d × k)."""
    return o.base @ rotated_matrix(o)


def _dM_pre(g: Tensor, o: Operands) -> Callable[[int, int], Tensor]:
    outer, weight = g.mT @ o.rows, o.base
    return lambda start, stop: outer[start:stop] @ weight.mT


def _dM_post(g: Tensor, o: Operands) -> Callable[[int, int], Tensor]:
    outer, weight = g.mT @ o.rows, o.base
    return lambda start, stop: weight[:, start:stop].mT @ outer


def _folding(
    name: str,
    fold: Callable[[Operands], Tensor],
    gradient_of_multiplier: Callable[[Tensor, Operands], Callable[[int, int], Tensor]],
    reference: Callable[[Operands], Tensor],
) -> Form:
    def forward(o: Operands, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        folded = fold(o) if kept is None else kept
        return F.linear(o.rows, folded, o.shift), folded

    def backward(grad: Tensor, o: Operands, folded: Tensor, needs: Sequence[bool]) -> Gradients:
        g = as_rows(grad)
        dx = (g @ folded).view(o.x.shape) if needs[0] else None
        dA = dB = None
        if needs[2] or needs[3]:
            dA, dB = factor_gradients(o, gradient_of_multiplier(g, o))
        return dx, g.sum(0) if needs[1] else None, dA, dB

    return register(Form(name, forward, backward, reference, lambda o: o.base.shape))


def _fold_pre_reference(o: Operands) -> Tensor:
    out = permuted(replace(o, x=F.linear(o.x, o.base), bias=None))
    return out if o.bias is None else out + o.bias


def _fold_post_reference(o: Operands) -> Tensor:
    return F.linear(permuted(replace(o, bias=None)), o.base, o.bias)


def _shape_of_kept(o: Operands) -> Sequence[int]:
    return (o.A.shape[-1],) * 2 if _keeps_multiplier(o) else (0,)


ROTATE = register(Form("rotate", _rotate, _rotate_backward, permuted, _shape_of_kept))
FOLD_PRE = _folding("fold_pre", folded_pre, _dM_pre, _fold_pre_reference)
FOLD_POST = _folding("fold_post", folded_post, _dM_post, _fold_post_reference)
