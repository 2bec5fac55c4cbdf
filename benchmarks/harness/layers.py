"""Linear layers of a given shape, and a step through one of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.harness import DEVICE, Run, contenders


class Shape(NamedTuple):
    """A layer of d outputs and k inputs on b tokens, and the rank of its adapter."""

    d: int
    k: int
    b: int
    r: int = 8
    dtype: torch.dtype = torch.float32


class Projections(nn.Module):
    """Linear layers of one shape, each applied to the same input; their outputs side by side."""

    def __init__(self, shape: Shape, count: int, bias: bool) -> None:
        super().__init__()
        make: dict[str, Any] = {"bias": bias, "device": DEVICE, "dtype": shape.dtype}
        self.layers = nn.ModuleDict({f"p{i}": nn.Linear(shape.k, shape.d, **make) for i in range(count)})

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.layers.values()])


def step(model: nn.Module, x: Tensor, gradient: Tensor, compiled: bool = False) -> Run:
    """Forward and backward of the layer itself, past the wrappers around it.

    What is trained is written to before each run, as an optimiser does, so that nothing is carried over.
    """
    layer = contenders.inner(model).layers["p0"]
    layer = torch.compile(layer) if compiled else layer
    trained = contenders.trainable(model)

    def run() -> None:
        if trained:
            torch._foreach_mul_([parameter.detach() for parameter in trained], 1.0)
        torch.autograd.grad(layer(x), [x, *trained], gradient)

    return run
