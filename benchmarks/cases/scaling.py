"""How the time of one square layer grows with tokens, width, rank and the number of adapters in a batch.

    python -m benchmarks.cases.scaling -o docs/results/speed/scaling.json

Forward and backward for tokens, width and rank, as in ``benchmarks.cases.layer``; where not varied, 1,024 wide, 1,024
tokens, r = 8. ``adapters`` is prediction: 64 rows of one token through one layer with ``adapter_names``, spread evenly
over 1 to 64 of the 64 adapters that are loaded. Contenders there are called through PEFT's model, which takes the
names.
"""

from __future__ import annotations

from functools import partial
from itertools import cycle, islice

import torch

from benchmarks.harness import DEVICE, Case, Run, contenders, interleave, parse, parser, write
from benchmarks.harness.layers import Projections, Shape, step

NAMES = ("frozen", "lora", "dora", "rebuild-permutation", "lorma-plus", "lorma-permutation")
MIXED = ("lora", "lorma-plus", "lorma-permutation")
POWERS = (1, 2, 4, 8, 16, 32, 64)
WIDTH, TOKENS, RANK, ROWS = 1024, 1024, 8, 64
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
WIDTHS = (256, 512, 1024, 2048)


def training(width: int, tokens: int, r: int, rounds: int) -> dict[str, Case]:
    """Forward and backward of every contender on one layer."""
    torch.manual_seed(1)
    shape = Shape(width, width, tokens, r)
    base = Projections(shape, 1, bias=False)
    x = torch.randn(tokens, width, device=DEVICE, requires_grad=True)
    gradient = torch.randn(tokens, width, device=DEVICE)
    steps = {name: step(contenders.build(name, base, ["p0"], r).train(), x, gradient) for name in NAMES}
    return interleave(steps, rounds, every=contenders.SLOW, least_seconds=0.02)


def mixed_batches(width: int, counts: tuple[int, ...], rounds: int) -> list[Case]:
    """One token a row, ``ROWS`` rows, for several numbers of adapters; the frozen layer knows none."""
    torch.manual_seed(1)
    base = Projections(Shape(width, width, ROWS), 1, bias=False)
    x = torch.randn(ROWS, width, device=DEVICE)
    models = {name: contenders.build_many(name, base, ["p0"], max(counts), RANK) for name in MIXED}
    cases = []
    for count in counts:
        names = list(islice(cycle(str(number) for number in range(count)), ROWS))
        calls: dict[str, Run] = {"frozen": partial(base, x)}
        calls |= {name: partial(model, x, adapter_names=names) for name, model in models.items()}
        with torch.inference_mode():
            cases.append({"value": count, "results": interleave(calls, rounds, least_seconds=0.01)})
    return cases


def main() -> None:
    arguments = parse(parser(__doc__, rounds=7))
    rounds = arguments.rounds
    width, tokens = (32, 32) if arguments.quick else (WIDTH, TOKENS)
    lengths, widths, powers = ((16, 64), (16, 64), (1, 4)) if arguments.quick else (LENGTHS, WIDTHS, POWERS)
    axes = {
        "tokens": [{"value": b, "results": training(width, b, RANK, rounds)} for b in lengths],
        "width": [{"value": n, "results": training(n, tokens, RANK, rounds)} for n in widths],
        "rank": [{"value": r, "results": training(width, tokens, r, rounds)} for r in powers],
        "adapters": mixed_batches(width, powers, rounds),
    }
    fixed = {"width": width, "tokens": tokens, "r": RANK, "mixed_rows": ROWS}
    write(arguments, {"fixed": fixed, "axes": axes})


if __name__ == "__main__":
    main()
