"""Where the time of one layer's forward and backward goes, operation by operation.

    python -m benchmarks.cases.profile_layer lorma-permutation 768 768 256

Prints milliseconds of a step for each operation and shape of operands, longest first, as PyTorch's profiler counts
them (its own cost included), for any contender of ``benchmarks.harness.contenders`` on d outputs, k inputs and b
tokens.
"""

from __future__ import annotations

import argparse

import torch
from torch.profiler import profile

from benchmarks.harness import DEVICE, contenders
from benchmarks.harness.layers import Projections, Shape, step

WARMUP, STEPS = 5, 20


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("contender", choices=contenders.ALL)
    for name, what in (("d", "outputs"), ("k", "inputs"), ("b", "tokens")):
        made.add_argument(name, type=int, help=what)
    arguments = made.parse_args()
    d, k, b = arguments.d, arguments.k, arguments.b
    base = Projections(Shape(d, k, b), 1, bias=False)
    model = contenders.build(arguments.contender, base, ["p0"]).train()
    x = torch.randn(b, k, device=DEVICE, requires_grad=True)
    run = step(model, x, torch.randn(b, d, device=DEVICE))
    for _ in range(WARMUP):
        run()
    with profile(record_shapes=True) as found:
        for _ in range(STEPS):
            run()
    entries = found.key_averages(group_by_input_shape=True)
    rows = sorted(((e.self_cpu_time_total / STEPS / 1e3, e.key, e.input_shapes) for e in entries), reverse=True)
    for milliseconds, name, shapes in rows[:14]:
        print(f"{milliseconds:8.3f}  {name}  {[shape for shape in shapes if shape]}")
    print(f"{sum(row[0] for row in rows):8.3f}  in all")


if __name__ == "__main__":
    main()
