"""What every hand-written form has: one signature, one autograd function, one custom operator.

A form computes an adapted layer, or multiplies activations, from the same operands. It says what the forward pass
keeps, how gradients follow from that, and which eager formula it stands for. The formula is the reference that it is
tested against, and takes over wherever a hand-written backward pass cannot serve: function transforms, forward-mode
differentiation, tracing for export, a trained base weight, and the backward pass of a backward pass. It also takes
over where it is the quicker way: a hand-written pass saves passes over memory, but its Python takes as long as a small
product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from lorma.kernels.context import only_plain_operations, without_autocast

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Of ``x``, ``bias``, ``A`` and ``B``; None where none is asked for."""


@dataclass(frozen=True, slots=True)
class Operands:
    """What a form computes from.

    Attributes:
        x: (…, k) for forms with a weight; for those that multiply activations, (…, n).
        weight: W0, frozen, d × k; None for forms that only see activations.
        bias: the bias of the base layer, which the multiplier does not touch.
        A: r × n.
        B: n × r.
        scaling: the scalar s.
        dtype: what products are computed in, and the dtype of the output.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scaling: float
    dtype: torch.dtype

    @property
    def rows(self) -> Tensor:
        """``x`` as a matrix, one row for each token."""
        return in_dtype(as_rows(self.x), self.dtype)

    @property
    def base(self) -> Tensor:
        """The weight in the dtype of the computation."""
        return in_dtype(cast(Tensor, self.weight), self.dtype)

    @property
    def shift(self) -> Tensor | None:
        """The bias in the dtype of the computation."""
        return None if self.bias is None else in_dtype(self.bias, self.dtype)


def _never(_: Operands, __: bool) -> bool:
    return False


def compiled_without_gradients(_: Operands, differentiable: bool) -> bool:
    """Where a compiler makes more of a formula than of an operator that it cannot look into."""
    return not differentiable and torch.compiler.is_compiling()


@dataclass(frozen=True)
class Form:
    """One way of computing; see the module's text.

    Attributes:
        forward: operands and what an earlier call with the same weight and factors has kept, or None → the output, one
            row for each token, and what is kept for the backward pass.
        backward: gradient of the rows, operands, what was kept, which gradients are needed → those gradients.
        reference: operands → the output in the shape of ``x``, in eager differentiable PyTorch.
        kept_shape: operands → shape of what is kept.
        is_plain: operands, whether a gradient is asked for → whether ``reference`` is the better way all the same.
    """

    name: str
    forward: Callable[[Operands, Tensor | None], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Operands, Tensor, Sequence[bool]], Gradients]
    reference: Callable[[Operands], Tensor]
    kept_shape: Callable[[Operands], Sequence[int]]
    is_plain: Callable[[Operands, bool], bool] = _never


FORMS: dict[str, Form] = {}


def register(form: Form) -> Form:
    """Make a form known to the custom operator by its name."""
    FORMS[form.name] = form
    return form


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, for less than that costs where there is nothing to do: decoding calls this often."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def as_rows(x: Tensor) -> Tensor:
    """``x`` (…, n) as a matrix, one row for each token."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def run(form: Form, operands: Operands, kept: Tensor | None = None) -> Tensor:
    """Compute ``form`` by the cheapest way that is right here.

    Gradients flow to ``x``, ``bias``, ``A`` and ``B``, and to the weight if it is trained as well.
    """
    o = operands
    differentiable = trained = False
    compiling = torch.compiler.is_compiling()
    if torch.is_grad_enabled():
        differentiable = any(t is not None and t.requires_grad for t in (o.x, o.bias, o.A, o.B))
        trained = o.weight is not None and o.weight.requires_grad
        if differentiable and not compiling and o.x.is_inference():
            o = replace(o, x=o.x.clone())
    if trained or form.is_plain(o, differentiable) or only_plain_operations():
        return _reference(form, o)
    if compiling:
        out = _operator(o.x, o.weight, o.bias, o.A, o.B, o.scaling, form.name, o.dtype)[0]
    elif not differentiable:
        with without_autocast(o.x):
            out = form.forward(o, kept)[0]
    else:
        out = _Run.apply(form, o.scaling, o.dtype, o.x, o.weight, o.bias, o.A, o.B, kept)
    # Here and not inside, where autograd would forbid changing the output in place.
    return cast(Tensor, out).view(*o.x.shape[:-1], out.shape[-1])


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether a dtype has so few bits that rounding a sum to it may lose its small part."""
    return dtype.itemsize < 4


def centred(o: Operands, z: Tensor) -> tuple[Tensor, Tensor | None]:
    """``z − bias``, and what of the bias is left to be taken from products of it.

    Taking it from products saves a pass over z. In a narrow dtype the bias goes first: a product is rounded, and with
    a large bias in it nothing of what matters may be left.
    """
    bias = o.shift
    return (z - bias, None) if bias is not None and is_narrow(o.dtype) else (z, bias)


def _reference(form: Form, o: Operands) -> Tensor:
    with without_autocast(o.x):
        return form.reference(o)


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, form: Form, scaling: float, dtype: torch.dtype, *tensors: Any) -> Tensor:
        x, weight, bias, A, B, kept = tensors
        with without_autocast(x):
            out, kept = form.forward(Operands(x, weight, bias, A, B, scaling, dtype), kept)
        ctx.form, ctx.scaling, ctx.dtype = form, scaling, dtype
        ctx.save_for_backward(x, weight, bias, A, B, kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, bias, A, B, kept = ctx.saved_tensors
        operands = Operands(x, weight, bias, A, B, ctx.scaling, ctx.dtype)
        needs = [ctx.needs_input_grad[i] for i in (3, 5, 6, 7)]
        with without_autocast(grads[0]):
            batched = torch._C._functorch.is_legacy_batchedtensor(grads[0])
            if batched or torch.is_grad_enabled() or only_plain_operations():
                found = _differentiable_gradients(ctx.form, grads[0], operands, needs)
            else:
                found = _gradients(ctx.form, grads[0], operands, kept, needs)
        return (None, None, None, found[0], None, *found[1:], None)


def _gradients(form: Form, grad: Tensor, o: Operands, kept: Tensor, needs: Sequence[bool]) -> Gradients:
    """Gradients in the dtypes of the tensors they belong to."""
    found = form.backward(in_dtype(grad, o.dtype), o, kept, needs)
    like: Any = (o.x, o.bias, o.A, o.B)
    triples = zip(found, like, needs, strict=True)
    return cast(Gradients, tuple(in_dtype(g, t.dtype) if need and g is not None else None for g, t, need in triples))


def _differentiable_gradients(form: Form, grad: Tensor, o: Operands, needs: Sequence[bool]) -> Gradients:
    """Gradients from the reference, to be differentiated again (``create_graph``) or batched (``is_grads_batched``).

    They are taken with respect to aliases: A may also be in the history of ``x``, which is not asked for here.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases: list[Any] = [None if t is None else t.view_as(t) for t in (o.x, o.bias, o.A, o.B)]
        wanted = [t for t, need in zip(aliases, needs, strict=True) if need]
        x, bias, A, B = aliases
        out = as_rows(_reference(form, replace(o, x=x, bias=bias, A=A, B=B)))
    found = iter(torch.autograd.grad(out, wanted, grad.to(out.dtype), create_graph=again))
    return cast(Gradients, tuple(next(found) if need else None for need in needs))


@torch.library.custom_op("lorma::multiplied", mutates_args=())
def _operator(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    form: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    with without_autocast(x):
        return FORMS[form].forward(Operands(x, weight, bias, A, B, scaling, dtype), None)


@_operator.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    form: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    width = x.shape[-1] if weight is None else weight.shape[0]
    kept = FORMS[form].kept_shape(Operands(x, weight, bias, A, B, scaling, dtype))
    return x.new_empty((x.shape[:-1].numel(), width), dtype=dtype), x.new_empty(tuple(kept), dtype=dtype)


@torch.library.custom_op("lorma::multiplied_backward", mutates_args=())
def _backward_operator(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    kept: Tensor,
    scaling: float,
    form: str,
    dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with without_autocast(x):
        found = _gradients(FORMS[form], grad, Operands(x, weight, bias, A, B, scaling, dtype), kept, needs)
    return cast(Any, tuple(grad.new_empty(0) if g is None else g.contiguous() for g in found))


@_backward_operator.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    kept: Tensor,
    scaling: float,
    form: str,
    dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like: Any = (x, bias, A, B)
    made = (t.new_empty(t.shape) if need else grad.new_empty(0) for t, need in zip(like, needs, strict=True))
    return cast(Any, tuple(made))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, scaling, form, dtype = inputs
    ctx.options = scaling, form, dtype
    ctx.save_for_backward(*tensors, output[1])


def _operator_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> Any:
    *tensors, kept = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 2, 3, 4)]
    found = _backward_operator(grad, *tensors, kept, *ctx.options, needs)
    dx, dbias, dA, dB = (g if need else None for g, need in zip(found, needs, strict=True))
    return dx, None, dbias, dA, dB, None, None, None


_operator.register_autograd(_operator_backward, setup_context=_keep)
