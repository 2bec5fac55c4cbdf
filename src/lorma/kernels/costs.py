"""What each way of computing LoRMAπ costs, from measured rates, and which is the cheapest.

Operations are counted; how long one takes was measured (``benchmarks/cases/cost_model.py``) for the kinds of devices
and dtypes that are listed in ``costs.json``; others borrow the rates nearest to theirs. CPUs with AVX-512 are a kind of
their own: products gain more from it than transforms do. Rates are fixed in the package and not measured on the user's
machine, so that the same run makes the same choices, and the same rounding, whenever it is repeated there.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from typing import Literal, TypeAlias

import torch

Way: TypeAlias = Literal["fold", "multiply", "correlate"]


@dataclass(frozen=True)
class Rates:
    """Seconds for one of each.

    Attributes:
        product: multiplication and addition inside a large matrix product.
        element: element of an n × n matrix formed from the factors, or whose gradient is taken back to them.
        transform: real number through the transforms of one correlation, divided by log₂ n, with n a power of two.
        mixed_transform: likewise with n any other even number.
        call: call of an operation, however small.
    """

    product: float
    element: float
    transform: float
    mixed_transform: float
    call: float


@dataclass(frozen=True)
class Shape:
    """What costs depend on: n is the multiplied side of the weight, m the other (0 if the weight is out of reach)."""

    tokens: int
    n: int
    m: int
    r: int


def _measured() -> dict[tuple[str, torch.dtype], Rates]:
    text = files("lorma.kernels").joinpath("costs.json").read_text(encoding="utf-8")
    table = {}
    for key, values in json.loads(text)["rates"].items():
        kind, dtype = key.split("/")
        table[kind, getattr(torch, dtype)] = Rates(**values)
    return table


RATES = _measured()
_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


def kind_of(device: str) -> str:
    """What rates are listed under: the type of the device, for a CPU with AVX-512 also that."""
    return "cpu-avx512" if device == "cpu" and _AVX512 else device


def rates(kind: str, dtype: torch.dtype) -> Rates:
    """Measured rates for a kind of device and a dtype; where nothing was measured, those nearest to it."""
    for key in ((kind, dtype), (kind, torch.float32), ("cpu", dtype)):
        if key in RATES:
            return RATES[key]
    return RATES["cpu", torch.float32]


def costs(shape: Shape, rate: Rates, *, training: bool) -> dict[Way, float]:
    """Seconds that each way takes beyond the frozen layer.

    Args:
        shape: what is computed; with ``m = 0`` the weight cannot be folded.
        rate: what operations cost.
        training: whether a backward pass follows.
    """
    b, n, m, r = shape.tokens, shape.n, shape.m, shape.r
    square = n * n
    form = rate.product * r * square + rate.element * square
    transforms = _transforms(shape, rate)
    found: dict[Way, float] = {}
    if m:
        fold = form + rate.product * square * m + 3 * rate.call
        back = rate.product * (b * n * m + square * m) + 2 * form + 8 * rate.call
        found["fold"] = fold + (back if training else 0.0)
    multiply = form + rate.product * b * square + 4 * rate.call
    back = 2 * rate.product * b * square + 2 * form + 8 * rate.call
    found["multiply"] = multiply + (back if training else 0.0)
    found["correlate"] = (transforms + 8 * rate.call) * (3.3 if training else 1)
    return found


def _transforms(shape: Shape, rate: Rates) -> float:
    n = shape.n
    transform = rate.transform if n & (n - 1) == 0 else rate.mixed_transform
    return transform * shape.tokens * (shape.r + 1) * n * math.log2(max(n, 2))


def together(shape: Shape, rate: Rates, rows: int, adapters: int) -> bool:
    """Whether rows with multipliers of their own are best correlated all at once, each with a copy of its factors.

    The other way is one adapter after the other, by the cheapest way for it.

    Args:
        shape: of one row.
        rate: what operations cost.
        rows: how many rows there are.
        adapters: how many adapters they have between them.
    """
    everything, each = (replace(shape, tokens=shape.tokens * rows // parts) for parts in (1, adapters))
    at_once = _transforms(everything, rate) + 2 * rate.element * rows * shape.r * shape.n + 8 * rate.call
    return at_once <= adapters * (min(costs(each, rate, training=False).values()) + 16 * rate.call)


def cheapest(shape: Shape, rate: Rates, *, training: bool) -> Way:
    """The way with the smallest of :func:`costs`.

    Nothing but sizes counts, not even a folded weight that is at hand: what is recomputed must come out the same.
    """
    choose = _cheapest if torch.compiler.is_compiling() else _remembered
    return choose(shape, rate, training)


def _cheapest(shape: Shape, rate: Rates, training: bool) -> Way:
    found = costs(shape, rate, training=training)
    best: Way = "multiply"
    for way, cost in found.items():
        if cost < found[best]:
            best = way
    return best


_remembered = lru_cache(maxsize=4096)(_cheapest)
