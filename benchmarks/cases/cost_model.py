"""Rates from which the library chooses a way of computing LoRMAπ, and how well the choice does.

    python -m benchmarks.cases.cost_model -o docs/results/speed/cost_model.json --install
    ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 \\
        python -m benchmarks.cases.cost_model -o docs/results/speed/cost_model_avx2.json --install

The second measures a CPU with AVX-512 as one without.
Each rate is the median of interleaved runs on one middling size; they are written into the package
(``src/lorma/kernels/costs.json``) with ``--install``, beside those of other devices. ``choices`` then times every way
on a grid of sizes and says which was fastest, which the model takes, and what the wrong choices cost.
"""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import DEVICE, ROOT, Case, Run, interleave, parse, parser, write
from lorma.kernels.circular import CORRELATE
from lorma.kernels.costs import Rates, Shape, cheapest, kind_of
from lorma.kernels.form import Operands, run
from lorma.kernels.permutation import FOLD_PRE, ROTATE
from lorma.kernels.rotation import factor_gradients, multiplier_blocks

DTYPES = (torch.float32, torch.bfloat16)
COSTS = ROOT / "src" / "lorma" / "kernels" / "costs.json"
SIDES = ((384, 384), (768, 768), (1024, 1024), (1024, 4096), (4096, 1024))
GRID = [(b, n, m) for n, m in SIDES for b in (1, 16, 256, 1024, 4096) if b * n < 2**22]


def operands(b: int, n: int, m: int, r: int, dtype: torch.dtype) -> Operands:
    """A layer of n outputs and m inputs on b tokens."""
    torch.manual_seed(1)
    weight = torch.randn(n, m, device=DEVICE, dtype=dtype) / m**0.5
    A, B = torch.randn(r, n, device=DEVICE, requires_grad=True), torch.randn(n, r, device=DEVICE, requires_grad=True)
    return Operands(torch.randn(b, m, device=DEVICE, dtype=dtype), weight, None, A, B, 1.0, dtype)


def activations(o: Operands) -> Operands:
    """Random activations of the width that is multiplied, without a weight."""
    z = torch.randn(len(o.x), o.A.shape[-1], device=DEVICE, dtype=o.dtype)
    return Operands(z, None, None, o.A, o.B, 1.0, o.dtype)


def transforms(tokens: int, r: int, n: int) -> float:
    """Of what ``transform`` in ``lorma.kernels.costs`` is the price."""
    return tokens * (r + 1) * n * math.log2(n)


def measured_rates(dtype: torch.dtype, quick: bool, rounds: int) -> dict[str, float]:
    """The rates of one dtype."""
    n, r = (128, 8) if quick else (1024, 8)
    many = 1024
    o = operands(many, n, n, r, dtype)
    odd = operands(many, n * 9 // 8, n, r, dtype)
    square, tiny = torch.randn(n, n, device=DEVICE, dtype=dtype), torch.randn(8, 8, device=DEVICE, dtype=dtype)
    runs: dict[str, Run] = {
        "product": partial(F.linear, o.x, square),
        "form": lambda: list(multiplier_blocks(o)),
        "back": partial(factor_gradients, o, square[:, :1], square[:1]),
        "transform": partial(run, CORRELATE, activations(o)),
        "mixed_transform": partial(run, CORRELATE, activations(odd)),
        "call": partial(F.linear, tiny, tiny),
    }
    with torch.no_grad():
        found = {name: r["seconds"]["p50"] for name, r in interleave(runs, rounds, 3, least_seconds=0.01).items()}
    product = found["product"] / (many * n * n)
    return {
        "product": product,
        "element": max((found["form"] + found["back"]) / 2 / n**2 - r * product, product),
        "transform": found["transform"] / transforms(many, r, n),
        "mixed_transform": found["mixed_transform"] / transforms(many, r, n * 9 // 8),
        "call": found["call"],
    }


def ways(o: Operands) -> dict[str, Run]:
    """Forward and backward of every way, beyond the base layer where it is the same for all."""
    weight, x = o.base, o.x.clone().requires_grad_()

    def multiply() -> Tensor:
        return run(ROTATE, Operands(F.linear(x, weight), None, None, o.A, o.B, 1.0, o.dtype))

    def correlate() -> Tensor:
        return run(CORRELATE, Operands(F.linear(x, weight), None, None, o.A, o.B, 1.0, o.dtype))

    def fold() -> Tensor:
        return run(FOLD_PRE, Operands(x, weight, None, o.A, o.B, 1.0, o.dtype))

    def step(forward: Any) -> None:
        out = forward()
        torch.autograd.grad(out, [x, o.A, o.B], torch.ones_like(out))

    return {"multiply": partial(step, multiply), "correlate": partial(step, correlate), "fold": partial(step, fold)}


def choice(b: int, n: int, m: int, rate: Rates, rounds: int) -> Case:
    """Every way on one size, and the model's choice."""
    o = operands(b, n, m, 8, torch.float32)
    seconds = {name: r["seconds"]["p50"] for name, r in interleave(ways(o), rounds).items()}
    taken = cheapest(Shape(b, n, m, 8), rate, training=True)
    best = min(seconds, key=lambda name: seconds[name])
    lost = seconds[taken] / seconds[best] - 1
    return {"b": b, "n": n, "m": m, "seconds": seconds, "fastest": best, "taken": taken, "lost": round(lost, 3)}


def main() -> None:
    made = parser(__doc__, rounds=15)
    made.add_argument("--install", action="store_true", help="write the rates into the package")
    arguments = parse(made)
    content: dict[str, Any] = json.loads(COSTS.read_text(encoding="utf-8"))
    found = {}
    for dtype in DTYPES:
        name = f"{kind_of(DEVICE.type)}/{str(dtype).removeprefix('torch.')}"
        values = measured_rates(dtype, arguments.quick, arguments.rounds)
        found[name] = {key: float(f"{value:.3g}") for key, value in values.items()}
    if arguments.install:
        content["rates"].update(found)
        partial_file = Path(f"{COSTS}.partial")
        partial_file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        partial_file.replace(COSTS)
    rate = Rates(**found[f"{kind_of(DEVICE.type)}/float32"])
    grid = [(16, 48, 32)] if arguments.quick else GRID
    choices = [choice(*size, rate, max(2, arguments.rounds // 3)) for size in grid]
    for case in choices:
        print(f"{case['n']} × {case['m']}, {case['b']} tokens: {case['taken']}, {case['fastest']} was fastest")
    write(arguments, {"rates": found, "choices": choices})


if __name__ == "__main__":
    main()
