"""The one place that chooses how a multiplier is applied."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from lorma.functional import Inflation, Side, multiplier_update
from lorma.functional.multiplier import Scaling
from lorma.kernels.circular import CORRELATE
from lorma.kernels.costs import Shape, Way, cheapest, rates
from lorma.kernels.folding import FoldedWeight
from lorma.kernels.form import Operands, only_plain_operations, run, without_autocast
from lorma.kernels.low_rank import LOW_RANK, LOW_RANK_LINEAR
from lorma.kernels.permutation import FOLD_POST, FOLD_PRE, ROTATE, folded_post, folded_pre


def computation_dtype(x: Tensor, A: Tensor) -> torch.dtype | None:
    """What products are computed in: autocast's dtype, that of ``x`` and A, or bfloat16 if ``x`` is; None otherwise.

    None stands for factors wider than the activations in a format that overflows or that is not known here; there the
    update is computed in the wider dtype.
    """
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if autocast and x.is_floating_point() and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    if x.dtype == A.dtype or (x.dtype == torch.bfloat16 and A.dtype == torch.float32):
        return x.dtype
    return None


def multiply(
    x: Tensor, A: Tensor, B: Tensor, scaling: Scaling, inflation: Inflation, bias: Tensor | None = None
) -> Tensor:
    """``I(BA)·(x − bias) + bias`` for every row of ``x`` (…, n), in the dtype of ``x`` or in autocast's.

    Args:
        x: activations; the output of a base layer with its ``bias`` (side ``pre``), or its input (``post``).
        A: r × n; with leading dimensions the eager formula is used.
        B: n × r.
        scaling: the scalar s.
        inflation: which multiplier.
        bias: what is not multiplied.
    """
    dtype = computation_dtype(x, A)
    if dtype is None or A.ndim > 2 or inflation == "none":
        wide = torch.promote_types(x.dtype, A.dtype)
        inner = (x if bias is None else x - bias).to(wide)
        return (x + multiplier_update(inner, A.to(wide), B.to(wide), scaling, inflation)).to(x.dtype)
    operands = _operands(x, None, bias, A, B, scaling, dtype)
    if inflation == "plus":
        return run(LOW_RANK, operands)
    return run(CORRELATE if _way(operands, folded=False) == "correlate" else ROTATE, operands)


def multiplied_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: Scaling,
    inflation: Inflation,
    side: Side,
    folded: FoldedWeight | None = None,
) -> Tensor | None:
    """``x·(I(BA)·W0)ᵀ + bias`` (side ``pre``) or ``x·(W0·I(BA))ᵀ + bias`` (``post``) for a weight at hand.

    Args:
        x: (…, k).
        weight: W0, d × k, floating.
        bias: d, not multiplied.
        A, B, scaling, inflation: as for :func:`multiply`.
        side: n = d for ``pre``, n = k for ``post``.
        folded: holds a folded weight between calls, where folding is cheapest.

    Returns:
        (…, d), or None if there is no form for these dtypes.
    """
    dtype = computation_dtype(x, A)
    if dtype is None or inflation == "none" or (dtype == x.dtype and weight.dtype != dtype):
        return None
    operands = _operands(x, weight, bias, A, B, scaling, dtype)
    if inflation == "plus" and side == "pre":
        return run(LOW_RANK_LINEAR, operands)
    if inflation == "permutation" and dtype.itemsize >= 4:
        if torch.compiler.is_compiling() or only_plain_operations():
            folded = None
        kept = folded.look_up(weight, A, B, operands.scaling) if folded is not None else None
        if _way(operands, folded=kept is not None) == "fold":
            return _fold(operands, side, folded, kept)
    if side == "pre":
        return multiply(F.linear(x, weight, bias), A, B, scaling, inflation, bias)
    return F.linear(multiply(x, A, B, scaling, inflation), weight, bias)


def _fold(o: Operands, side: Side, held: FoldedWeight | None, kept: Tensor | None) -> Tensor:
    form, fold = (FOLD_PRE, folded_pre) if side == "pre" else (FOLD_POST, folded_post)
    if held is not None and kept is None and torch.is_grad_enabled():
        with torch.no_grad(), without_autocast(o.x):
            kept = fold(o)
        held.keep(kept, cast(Tensor, o.weight), o.A, o.B, o.scaling)
    return run(form, o, kept)


def _operands(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, A: Tensor, B: Tensor, scaling: Scaling, dtype: torch.dtype
) -> Operands:
    if isinstance(scaling, Tensor):
        B, scaling = B * scaling, 1.0
    return Operands(x, weight, bias, A, B, scaling, dtype)


def _way(o: Operands, *, folded: bool) -> Way:
    n = o.A.shape[-1]
    m = 0 if o.weight is None else o.weight.numel() // n
    training = torch.is_grad_enabled() and (o.A.requires_grad or o.B.requires_grad)
    shape = Shape(o.x.numel() // o.x.shape[-1], n, m, len(o.A))
    return cheapest(shape, rates(o.x.device.type, o.dtype), training=training, folded=folded)
