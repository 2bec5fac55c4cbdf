"""The starts of training: values of A and B for which the multiplier is the identity, or as near as rank r allows."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lorma.functional.multiplier import Inflation, Scaling, check_factors, check_inflation, widen


@torch.no_grad()
def init_factors(A: Tensor, B: Tensor, scaling: Scaling, inflation: Inflation) -> None:
    """Fill A (r × n) and B (n × r) in place with the start of training.

    * ``plus`` (paper §3.2.2): B = 0, A Kaiming-uniform(a = √5). The multiplier is exactly I.
    * ``permutation`` (§3.2.1): B[:, 0] = 1/√s, rest of B Kaiming-uniform/√s; A[0, 0] = 1/√s, rest of A zero.
      ``s·Iπ(BA)`` is I up to rounding.
    * ``none`` (Table 6's ablation): B Kaiming-uniform/√s, A = pinv(B)/√s. ``s·BA`` projects onto B's columns: the
      identity there, zero elsewhere.

    Numbers are drawn in the order A, then B, from torch's default generator.

    Raises:
        ValueError: if the shapes do not fit, ``inflation`` is unknown or ``scaling`` is not positive.
    """
    check_factors(A, B)
    check_inflation(inflation)
    if not scaling > 0:
        raise ValueError(f"scaling={scaling} must be positive")
    if inflation == "plus":
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        B.zero_()
        return
    root = math.sqrt(scaling)
    nn.init.kaiming_uniform_(B, a=math.sqrt(5))
    if inflation == "permutation":
        A.zero_()
        A[0, 0] = 1 / root
        B.div_(root)
        B[:, 0] = 1 / root
    else:
        A.copy_(torch.linalg.pinv(widen(B)) / root)
        B.div_(root)
