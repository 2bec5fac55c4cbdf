"""LoRMAπ by matrix products: multiply the activations, or fold the weight once and use it as a plain layer.

With M = s·Iπ(BA), n × n, m the other side of the weight and b tokens, beside a frozen layer (forward and dx) as 1:

* ``rotate`` multiplies activations z, whoever made them: ``out = M·(z − bias) + bias``. ``dz = g·M``,
  ``dM = gᵀ(z − bias)``: 1.5·n/m more. In less than float32 the identity is kept apart, ``out = z + (M − I)·(z −
  bias)``, because rounding I + ΔM to 8 bits loses a small ΔM. Nothing but z is kept: forming M again takes r products
  a number where using it takes b.
* ``fold_pre`` and ``fold_post`` compute ``Wm = M·W0`` or ``W0·M`` and then ``x·Wmᵀ``. ``dx = g·Wm``, ``dM =
  (gᵀx)·W0ᵀ`` or ``W0ᵀ·(gᵀx)``: 0.5 + n/b more. Only in float32 and above, for the same reason. Wm is kept for the
  backward pass and may be used again while neither W0 nor the factors have changed.

M and dM pass by in blocks of rows (:mod:`lorma.kernels.rotation`); no matrix of size n × n is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from lorma.kernels.circular import permuted
from lorma.kernels.form import (
    Form,
    Gradients,
    Operands,
    as_rows,
    centred,
    compiled_without_gradients,
    in_dtype,
    is_narrow,
    register,
)
from lorma.kernels.rotation import factor_gradients, multiplier_blocks


def _accumulate(sum_so_far: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    return left @ right if sum_so_far is None else sum_so_far.addmm_(left, right)


def _rotate(o: Operands, _: Tensor | None) -> tuple[Tensor, Tensor]:
    apart, z = is_narrow(o.dtype), o.rows
    inner, bias = centred(o, z)
    out = z.new_empty(z.shape)
    for rows, block in multiplier_blocks(o, apart=apart):
        torch.mm(inner, block.mT, out=out[:, rows])
        if bias is not None:
            out[:, rows] += bias[rows] - block @ bias
    if apart:
        out += z
    return out, out.new_empty(0)


def _rotate_backward(grad: Tensor, o: Operands, _: Tensor, needs: Sequence[bool]) -> Gradients:
    g = as_rows(grad)
    total = g.sum(0) if o.bias is not None and (needs[1] or not is_narrow(o.dtype)) else None
    dz = dbias = dA = dB = None
    if needs[0] or needs[1]:
        apart = is_narrow(o.dtype)
        dz = g.clone() if apart and needs[0] else None
        for rows, block in multiplier_blocks(o, apart=apart):
            if needs[0]:
                dz = _accumulate(dz, g[:, rows], block)
            if needs[1] and total is not None:
                passed = total[rows] @ block
                dbias = passed if dbias is None else dbias + passed
        dz = None if dz is None else dz.view(o.x.shape)
        dbias = None if dbias is None or total is None else (0 if apart else total) - dbias
    if needs[2] or needs[3]:
        inner, bias = centred(o, o.rows)
        dA, dB = factor_gradients(o, g.mT, inner, None if total is None or bias is None else (total, bias))
    return dz, dbias, dA, dB


def folded_pre(o: Operands) -> Tensor:
    """``s·Iπ(BA)·W0`` (d × k)."""
    weight = o.base
    result = weight.new_empty(weight.shape)
    for rows, block in multiplier_blocks(o):
        torch.mm(block, weight, out=result[rows])
    return result


def folded_post(o: Operands) -> Tensor:
    """``W0·s·Iπ(BA)`` (d × k)."""
    result = None
    for rows, block in multiplier_blocks(o):
        result = _accumulate(result, o.base[:, rows], block)
    return cast(Tensor, result)


def _dM_pre(g: Tensor, o: Operands) -> tuple[Tensor, Tensor]:
    return g.mT @ o.rows, o.base.mT


def _dM_post(g: Tensor, o: Operands) -> tuple[Tensor, Tensor]:
    return o.base.mT, g.mT @ o.rows


def _folding(
    name: str,
    fold: Callable[[Operands], Tensor],
    gradient_of_multiplier: Callable[[Tensor, Operands], tuple[Tensor, Tensor]],
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
            dA, dB = factor_gradients(o, *gradient_of_multiplier(g, o))
        return dx, g.sum(0) if needs[1] else None, dA, dB

    return register(Form(name, forward, backward, reference, lambda o: o.base.shape, compiled_without_gradients))


def _fold_pre_reference(o: Operands) -> Tensor:
    bias = o.shift
    out = permuted(replace(o, x=F.linear(in_dtype(o.x, o.dtype), o.base), bias=None))
    return out if bias is None else out + bias


def _fold_post_reference(o: Operands) -> Tensor:
    return F.linear(permuted(replace(o, bias=None)), o.base, o.shift)


ROTATE = register(Form("rotate", _rotate, _rotate_backward, permuted, lambda o: (0,), compiled_without_gradients))
FOLD_PRE = _folding("fold_pre", folded_pre, _dM_pre, _fold_pre_reference)
FOLD_POST = _folding("fold_post", folded_post, _dM_post, _fold_post_reference)
