"""The one place that chooses how a multiplier is applied."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from lorma.functional import Inflation, Side, multiplier_update
from lorma.functional.multiplier import Scaling
from lorma.kernels.circular import CORRELATE, correlated_rows
from lorma.kernels.context import dispatch_mode_active, only_plain_operations, under_autocast, without_autocast
from lorma.kernels.costs import Shape, Way, cheapest, kind_of, rates, together
from lorma.kernels.form import Operands, is_narrow, run
from lorma.kernels.low_rank import LOW_RANK, LOW_RANK_LINEAR
from lorma.kernels.permutation import FOLD_POST, FOLD_PRE, ROTATE, folded_post, folded_pre
from lorma.kernels.tensor_cache import TensorCache

_CALL = 2**15
"""Numbers that a CPU copies in the time of a call of :func:`multiply`."""


def multiply(
    x: Tensor, A: Tensor, B: Tensor, scaling: Scaling, inflation: Inflation, bias: Tensor | None = None
) -> Tensor:
    """``I(BA)·(x − bias) + bias`` for every row of ``x`` (…, n), in the dtype of ``x``.

    Products are computed in autocast's dtype, in that of ``x`` and A, or in bfloat16 if ``x`` is. Where the factors are
    wider than ``x`` in another format, or autocast's dtype is narrower than ``x``, the eager formula adds the update to
    an ``x`` that is not rounded.

    Args:
        x: activations; the output of a base layer with its ``bias`` (side ``pre``), or its input (``post``).
        A: r × n; with leading dimensions the eager formula is used.
        B: n × r.
        scaling: the scalar s.
        inflation: which multiplier.
        bias: what is not multiplied.
    """
    dtype = _autocast_dtype(x) or _fitting_dtype(x, A)
    if dtype == x.dtype and A.ndim == 2 and inflation != "none":
        o = _operands(x, None, bias, A, B, scaling, dtype)
        return _activations(o, _way(o, inflation))
    if dtype != x.dtype or inflation != "plus":
        dtype = torch.promote_types(x.dtype, A.dtype)
    inner = (x if bias is None else x - bias).to(dtype)
    return (x + multiplier_update(inner, A.to(dtype), B.to(dtype), scaling, inflation)).to(x.dtype)


def multiply_rows(
    x: Tensor, A: Tensor, B: Tensor, which: Tensor, inflation: Inflation, bias: Tensor | None = None
) -> Tensor:
    """As :func:`multiply`, with one of several multipliers for each row of a batch, all rows at once.

    Args:
        x: (g, t, n), t tokens in each row.
        A: (u, r, n), of u adapters of one rank.
        B: (u, n, r), times the scalar s of each.
        which: (g,), the adapter of each row.
        inflation: ``"plus"`` or ``"permutation"``.
        bias: what is not multiplied.
    """
    if inflation == "permutation":
        return correlated_rows(x, A, B, which, bias)
    return multiply(x, A[which], B[which], 1.0, inflation, bias)


def rows_belong_together(rows: int, adapters: int, tokens: int, A: Tensor, inflation: Inflation) -> bool:
    """Whether :func:`multiply_rows` beats :func:`multiply` for one adapter after the other.

    Together each row has a copy of its factors, which on a CPU takes longer than a call for each adapter where several
    rows have the same.

    Args:
        rows: how many rows there are.
        adapters: how many adapters they have between them.
        tokens: in each row.
        A: r × n, of one of the adapters.
        inflation: their multiplier.
    """
    if inflation == "permutation":
        r, n = A.shape
        return together(Shape(tokens, n, 0, r), rates(kind_of(A.device.type), A.dtype), rows, adapters)
    return inflation == "plus" and (A.device.type != "cpu" or 2 * rows * A.numel() <= _CALL * adapters)


def multiplied_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: Scaling,
    inflation: Inflation,
    side: Side,
    *,
    transposed: bool = False,
    folded: TensorCache | None = None,
) -> Tensor | None:
    """``x·(I(BA)·W0)ᵀ + bias`` (side ``pre``) or ``x·(W0·I(BA))ᵀ + bias`` (``post``) for a weight at hand.

    Args:
        x: (…, k).
        weight: W0, d × k, floating.
        bias: d, not multiplied.
        A, B, scaling, inflation: as for :func:`multiply`.
        side: n = d for ``pre``, n = k for ``post``.
        transposed: whether ``weight`` is given as k × d.
        folded: holds a folded weight between calls, where folding is cheapest.

    Returns:
        (…, d), or None if there is no form for these dtypes.
    """
    autocast = _autocast_dtype(x)
    dtype = _fitting_dtype(x, A) if autocast is None else autocast
    if dtype is None or inflation == "none" or (autocast is None and weight.dtype != x.dtype):
        return None
    W = weight.T if transposed else weight
    o = _operands(x, W, bias, A, B, scaling, dtype)
    if inflation == "plus" and side == "pre":
        return run(LOW_RANK_LINEAR, o)
    way = _way(o, inflation)
    if way == "fold":
        form, fold = (FOLD_PRE, folded_pre) if side == "pre" else (FOLD_POST, folded_post)
        kept = None
        if folded is not None and not isinstance(scaling, Tensor) and _may_hold(o):
            kept = folded.look_up(weight, A, B, scaling)
            if kept is None:
                with torch.no_grad(), without_autocast(x):
                    kept = fold(o)
                folded.keep(kept, weight, A, B, scaling)
        return run(form, o, kept)
    if side == "pre":
        return _activations(replace(o, x=F.linear(x, W, bias), weight=None), way)
    return F.linear(_activations(replace(o, weight=None, bias=None), way), W, bias)


def _activations(o: Operands, way: Way | None) -> Tensor:
    return run(LOW_RANK if way is None else CORRELATE if way == "correlate" else ROTATE, o)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast rounds ``x`` to before a product; None if it leaves it alone."""
    if not under_autocast(x) or not x.is_floating_point() or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(x.device.type)


def _fitting_dtype(x: Tensor, A: Tensor) -> torch.dtype | None:
    """What products are computed in without autocast; None where A is wider than ``x`` in a format that overflows."""
    fits = x.dtype == A.dtype or (x.dtype == torch.bfloat16 and A.dtype == torch.float32)
    return x.dtype if fits else None


def _may_hold(o: Operands) -> bool:
    """Whether a folded weight may outlive the call: only while training here, and where no weight is sharded.

    And not while somebody looks on who expects the same operations when a part of the model is computed again.
    """
    if (
        torch.compiler.is_compiling()
        or only_plain_operations()
        or dispatch_mode_active()
        or not torch.is_grad_enabled()
    ):
        return False
    weight = o.base
    if weight.requires_grad or weight.is_inference():
        return False
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


def _operands(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, A: Tensor, B: Tensor, scaling: Scaling, dtype: torch.dtype
) -> Operands:
    if isinstance(scaling, Tensor):
        B, scaling = B * scaling, 1.0
    return Operands(x, weight, bias, A, B, scaling, dtype)


def _way(o: Operands, inflation: Inflation) -> Way | None:
    """How a permutation is best computed; None for any other multiplier."""
    if inflation != "permutation":
        return None
    if only_plain_operations():
        return "multiply"
    n = o.A.shape[-1]
    m = 0 if o.weight is None or is_narrow(o.dtype) else o.weight.numel() // n
    training = torch.is_grad_enabled() and (o.x.requires_grad or o.A.requires_grad or o.B.requires_grad)
    shape = Shape(o.x.shape[:-1].numel(), n, m, o.A.shape[0])
    # With few bits a pass without gradients must be rounded as one with them: reinforcement learning compares the two.
    as_trained = training or is_narrow(o.dtype)
    way = cheapest(shape, rates(kind_of(o.x.device.type), o.dtype), training=as_trained)
    # Correlations in few bits lose what is small beside a large bias: 8 % of a gradient on a CPU without AVX-512.
    return "multiply" if way == "correlate" and is_narrow(o.dtype) and o.bias is not None else way
