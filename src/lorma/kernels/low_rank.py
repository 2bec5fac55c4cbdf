"""LoRMA₊ without forming anything of size n × n; by hand, nothing is kept that LoRA does not keep.

With g the gradient of the output and s·B written as ``Bs``:

* ``low_rank_linear`` is side ``pre`` on a plain weight: ``out = y + u·Bsᵀ + bias`` with ``y = x·W0ᵀ`` and ``u = y·Aᵀ``.
  Kept are x (shared by query, key and value) and u (b × r), never y. ``v = g·Bs``, ``dx = g·W0 + v·(A·W0)``,
  ``dA = (vᵀx)·W0ᵀ``, ``dB = s·gᵀu``.
* ``low_rank`` multiplies activations z, whoever made them: ``out = z + u·Bsᵀ``, ``u = (z − bias)·Aᵀ``. On the output of
  a base layer that is side ``pre``, on its input side ``post``. ``dz = g + v·A``, ``dA = vᵀ(z − bias)``.

The formulas keep the same and A·W0 (r × k), because ``u = x·(A·W0)ᵀ`` as well. Their backward pass is PyTorch's own,
without a line of Python, and takes one pass over dx more: the quicker way until x has half a million numbers. With so
few tokens that even reading W0 is work, ``u = y·Aᵀ`` reads it two times less; y is kept then, which is small beside
the weight. In less than float32 a pass without gradients is computed as one with them, to the bit: reinforcement
learning compares the two.

Thin products are written for the libraries that compute them: on a CPU ``(uᵀg)ᵀ`` takes a third to a seventh of the
time of ``gᵀu``, and ``g·Bs`` two thirds when ``Bsᵀ`` is contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lorma.kernels import triton_low_rank
from lorma.kernels.context import add_product
from lorma.kernels.form import (
    Form,
    Gradients,
    Operands,
    as_rows,
    centred,
    in_dtype,
    is_narrow,
    register,
)

_SMALL = 2**19
"""Numbers in x up to which Python costs more than a pass over them, as measured on CPUs."""
_FEW = 16
"""Inputs of a layer for each token from which on y is kept: it is no more than a sixteenth of the weight."""


def _is_plain(o: Operands, differentiable: bool) -> bool:
    if differentiable or (is_narrow(o.dtype) and o.x.numel() > _SMALL):
        return o.x.numel() <= _SMALL
    return torch.compiler.is_compiling() or not (o.x.is_cuda and triton_low_rank.available(o.x, len(o.A)))


def _keeps_y(o: Operands) -> bool:
    return not torch.compiler.is_compiling() and _FEW * o.x.shape[:-1].numel() <= o.x.shape[-1]


def _is_plain_linear(o: Operands, differentiable: bool) -> bool:
    return _is_plain(o, differentiable) or (differentiable and _keeps_y(o))


def _factors(o: Operands) -> tuple[Tensor, Tensor]:
    """A, and the transpose of s·B made contiguous."""
    return o.A.to(o.dtype), (o.B.mT * o.scaling).to(o.dtype).contiguous()


def _down(y: Tensor, A: Tensor, bias: Tensor | None) -> Tensor:
    """``(y − bias)·Aᵀ``."""
    return F.linear(y, A, None if bias is None else -(A @ bias))


def _in_one_launch(out: Tensor, o: Operands) -> tuple[Tensor, Tensor]:
    u = out.new_empty(len(out), len(o.A))
    return triton_low_rank.low_rank_update(out, o.shift, o.A, o.B, o.scaling, u), u


def _low_rank(o: Operands, _: Tensor | None) -> tuple[Tensor, Tensor]:
    z = o.rows
    if triton_low_rank.available(z, len(o.A)):
        return _in_one_launch(z, o)
    A, Bt = _factors(o)
    inner, bias = centred(o, z)
    u = _down(inner, A, bias)
    return torch.addmm(z, u, Bt), u


def _low_rank_backward(grad: Tensor, o: Operands, u: Tensor, needs: Sequence[bool]) -> Gradients:
    A, Bt = _factors(o)
    g = as_rows(grad)
    v = F.linear(g, Bt)
    dz = torch.addmm(g, v, A).view(o.x.shape) if needs[0] else None
    dA = dbias = None
    total = v.sum(0) if o.bias is not None else None
    if needs[2]:
        inner, bias = centred(o, o.rows)
        dA = v.mT @ inner
        dA = dA if bias is None or total is None else dA.addr_(total, bias, alpha=-1)
    if needs[1] and total is not None:
        dbias = -(total @ A)
    dB = (u.mT @ g).mT * o.scaling if needs[3] else None
    return dz, dbias, dA, dB


def _low_rank_formula(o: Operands) -> Tensor:
    z, bias, A = o.rows, o.shift, in_dtype(o.A, o.dtype)
    u = F.linear(z, A) if bias is None else F.linear(z - bias, A)
    return torch.addmm(z, u, in_dtype(o.B, o.dtype).mT, alpha=o.scaling).view(o.x.shape)


def _linear(o: Operands, _: Tensor | None) -> tuple[Tensor, Tensor]:
    x, weight, bias = o.rows, o.base, o.shift
    out = F.linear(x, weight, bias)
    if triton_low_rank.available(out, len(o.A)):
        return _in_one_launch(out, o)
    A, Bt = _factors(o)
    # As in centred(), for less than a pass over the output.
    u = F.linear(x, A @ weight) if bias is not None and is_narrow(o.dtype) else _down(out, A, bias)
    return add_product(out, u, Bt), u


def _linear_backward(grad: Tensor, o: Operands, u: Tensor, needs: Sequence[bool]) -> Gradients:
    A, Bt = _factors(o)
    weight, g = o.base, as_rows(grad)
    v = F.linear(g, Bt)
    dx = None
    if needs[0]:
        # (g + v·A)·W0 = g·W0 + v·(A·W0): for few tokens reading W0 a second time costs more than a copy of g. Adding
        # the large product to the small one, and not the other way round, saves a pass over the result.
        few = 4 * len(g) <= weight.shape[1]
        dx = torch.addmm(g, v, A) @ weight if few else (v @ (A @ weight)).addmm_(g, weight)
        dx = dx.view(o.x.shape)
    dA = (v.mT @ o.rows) @ weight.mT if needs[2] else None
    dB = (u.mT @ g).mT * o.scaling if needs[3] else None
    return dx, g.sum(0) if needs[1] else None, dA, dB


def _linear_formula(o: Operands) -> Tensor:
    x, weight, bias = o.rows, o.base, o.shift
    A, Bt = in_dtype(o.A, o.dtype), in_dtype(o.B, o.dtype).mT
    y = F.linear(x, weight, bias)
    as_trained = is_narrow(o.dtype) and not torch.compiler.is_compiling()
    if (torch.is_grad_enabled() or as_trained) and not _keeps_y(o):
        out = add_product(y, F.linear(x, A @ weight), Bt, o.scaling)
    else:
        u = F.linear(y if bias is None else y - bias, A)
        out = torch.addmm(y, u, Bt, alpha=o.scaling) if u.requires_grad else add_product(y, u, Bt, o.scaling)
    return out if o.x.ndim == 2 else out.view(*o.x.shape[:-1], out.shape[1])


def _shape_of_u(o: Operands) -> Sequence[int]:
    return o.x.shape[:-1].numel(), len(o.A)


LOW_RANK = register(Form("low_rank", _low_rank, _low_rank_backward, _low_rank_formula, _shape_of_u, _is_plain))
LOW_RANK_LINEAR = register(
    Form("low_rank_linear", _linear, _linear_backward, _linear_formula, _shape_of_u, _is_plain_linear)
)
