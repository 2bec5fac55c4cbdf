"""What a dense LoRMAπ would take without autograd and Python around it, in frozen layers.

    python -m benchmarks.cases.permutation_floor 768 768 256

``five products`` are those that the floor counts: x·W0ᵀ, z·Mᵀ, g·M, gᵀ·z and dz·W0, of matrices at hand. ``all
passes`` are the same with M formed by blocks of rows, twice, and its gradient taken back to the factors, as
``lorma.kernels`` does it.
Prints medians over rounds of times divided by the frozen layer's two products in the same round.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import DEVICE, synchronise
from lorma.kernels.form import FORMS, Operands

RANK, REPEATS = 8, 3


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, what in (("n", "outputs, the multiplied side"), ("m", "inputs"), ("b", "tokens")):
        made.add_argument(name, type=int, help=what)
    made.add_argument("--rounds", type=int, default=61, help="timed rounds (default 61)")
    arguments = made.parse_args()
    n, m, b = arguments.n, arguments.m, arguments.b
    torch.set_default_device(DEVICE)
    torch.manual_seed(0)
    x, g, weight, M = torch.randn(b, m), torch.randn(b, n), torch.randn(n, m), torch.randn(n, n)
    A, B, dM = torch.randn(RANK, n), torch.randn(n, RANK), torch.empty(n, n)
    form = FORMS["rotate"]

    def frozen() -> tuple[Tensor, Tensor]:
        return F.linear(x, weight), g @ weight

    def products() -> tuple[Tensor, Tensor]:
        z = F.linear(x, weight)
        torch.mm(g.mT, z, out=dM)
        return F.linear(z, M), (g @ M) @ weight

    def passes() -> tuple[Tensor, Tensor]:
        operands = Operands(F.linear(x, weight), None, None, A, B, 1.0, x.dtype)
        out, kept = form.forward(operands, None)
        dz = form.backward(g, operands, kept, [True, False, True, True])[0]
        assert dz is not None
        return out, dz @ weight

    runs = {"frozen": frozen, "five products": products, "all passes": passes}
    ratios: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for _ in range(arguments.rounds + 1):
            seconds = {}
            for name in random.sample(list(runs), len(runs)):
                seconds[name] = _timed(runs[name])
            for name in runs:
                ratios[name].append(seconds[name] / seconds["frozen"])
    for name in runs:
        print(f"{name:14} {median(ratios[name][1:]):.3f}")


def _timed(run: Callable[[], object]) -> float:
    synchronise()
    start = time.perf_counter()
    for _ in range(REPEATS):
        run()
    synchronise()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
