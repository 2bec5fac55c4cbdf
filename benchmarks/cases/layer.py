"""Forward and backward of one linear layer: time, bytes kept for the backward pass, peak memory.

    python -m benchmarks.cases.layer -o docs/results/speed/layer.json
    python -m benchmarks.cases.layer --contenders frozen,lora,rebuild-permutation,lorma-plus,lorma-plus-auto,\\
lorma-permutation,lorma-permutation-auto --rounds 61 -o docs/results/speed/layer_close.json
    python -m benchmarks.cases.layer --compiled --contenders frozen,lora,lorma-plus,lorma-plus-auto,\\
lorma-permutation-auto -o docs/results/speed/layer_compiled.json

The second repeats what close calls are about often enough to tell two percent. The third times layers compiled by
``torch.compile``; bytes are of layers that are not compiled.
``--shapes 16x16x4`` is a layer so small that nothing but calls counts.

Shapes are d (outputs) × k (inputs) with b tokens, in float32; on a GPU also one large layer in bfloat16, adapters
included. The input requires a gradient, as it does in the middle of a model. Few tokens (256) are where a dense
permutation costs most, so those cases are about it. Bytes are also taken of three layers (q, k, v) on one input, which
should keep that input once.

``floor`` is the cost of a dense permutation in units of the frozen layer: the cheaper of multiplying activations and
folding the multiplier into the weight, with n the multiplied side, m the other one and two products of d·k·b as 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.harness import DEVICE, Case, contenders, interleave, parse, parser, write
from benchmarks.harness.layers import Projections, Shape, step
from benchmarks.harness.memory import peak_bytes, saved_bytes

MANY = (Shape(768, 768, 4096), Shape(1024, 1024, 4096), Shape(4096, 1024, 2048), Shape(1024, 4096, 2048))
FEW = tuple(shape._replace(b=256) for shape in MANY)
LARGE = Shape(4096, 4096, 8192, 16, torch.bfloat16)
QUICK = (Shape(48, 32, 64),)
FOR_FEW = ("frozen", "lora", "lorma-plus", "rebuild-permutation", "lorma-permutation", "lorma-permutation-auto")
FOR_SHARED = ("lora", "lorma-plus", "lorma-plus-auto", "lorma-permutation", "lorma-permutation-auto")


def measure(shape: Shape, names: Sequence[str], bias: bool, rounds: int, compiled: bool) -> Case:
    """All contenders on one layer."""
    torch.manual_seed(1)
    torch._dynamo.reset()
    base = Projections(shape, 1, bias)
    models = {name: contenders.build(name, base, ["p0"], shape.r).train() for name in names}
    x = torch.randn(shape.b, shape.k, device=DEVICE, dtype=shape.dtype, requires_grad=True)
    gradient = torch.randn(shape.b, shape.d, device=DEVICE, dtype=shape.dtype)
    steps = {name: step(model, x, gradient, compiled) for name, model in models.items()}
    memory = {
        name: {
            **contenders.counts(model, base),
            "saved_bytes": kept(model, x),
            "peak_bytes": peak_bytes(steps[name]),
        }
        for name, model in models.items()
    }
    times = interleave(steps, rounds, warmup=2, every=contenders.SLOW, least_seconds=0.02)
    return {
        **described(shape, bias),
        "floor": {"pre": floor(shape, shape.d), "auto": floor(shape, min(shape.d, shape.k))},
        "results": {name: times[name] | memory[name] for name in names},
    }


def shared_input(shape: Shape, bias: bool) -> Case:
    """Bytes kept by one layer, and by three on the same input."""
    torch.manual_seed(1)
    x = torch.randn(shape.b, shape.k, device=DEVICE, dtype=shape.dtype, requires_grad=True)
    bases = {count: Projections(shape, count, bias) for count in (1, 3)}
    results = {
        name: {
            f"saved_bytes_{count}": kept(contenders.build(name, base, list(base.layers), shape.r), x)
            for count, base in bases.items()
        }
        for name in FOR_SHARED
    }
    return {**described(shape, bias), "input_bytes": x.untyped_storage().nbytes(), "results": results}


def kept(model: nn.Module, x: Tensor) -> int:
    """Bytes that a model's forward pass keeps, the input included."""
    return saved_bytes(lambda: model.train()(x), contenders.held(model))


def floor(shape: Shape, n: int) -> float:
    """A dense permutation's forward and backward, with the frozen layer's as 1."""
    m = shape.d * shape.k / n
    return min(1.5 + n / shape.b, 1 + 1.5 * n / m)


def shapes(text: str) -> tuple[Shape, ...]:
    """``16x16x4,768x768x256`` as shapes."""
    sizes = (map(int, part.split("x")) for part in text.split(","))
    return tuple(Shape(d, k, b) for d, k, b in sizes)


def described(shape: Shape, bias: bool) -> Case:
    """What a case is about, for the results."""
    return {**shape._asdict(), "dtype": str(shape.dtype).removeprefix("torch."), "bias": bias}


def main() -> None:
    made = parser(__doc__, rounds=15)
    made.add_argument("--bias", action="store_true", help="layers with a bias")
    made.add_argument("--compiled", action="store_true", help="compile each layer")
    made.add_argument("--contenders", default=",".join(contenders.ALL), help="which ones, by name, between commas")
    made.add_argument("--shapes", type=shapes, help="DxKxB,… in place of the usual ones: outputs, inputs and tokens")
    arguments = parse(made)
    names = arguments.contenders.split(",")
    many, few = (arguments.shapes, ()) if arguments.shapes else (QUICK, QUICK) if arguments.quick else (MANY, FEW)
    plan = [(shape, names) for shape in many]
    plan += [(shape, [name for name in FOR_FEW if name in names]) for shape in few]
    if DEVICE.type == "cuda" and not arguments.quick and not arguments.shapes:
        plan.append((LARGE, names))
    cases = []
    for shape, present in plan:
        cases.append(measure(shape, present, arguments.bias, arguments.rounds, arguments.compiled))
        print(f"{shape.d} × {shape.k}, {shape.b} tokens: done", flush=True)
    shared = [shared_input(shape, arguments.bias) for shape in many]
    write(arguments, {"cases": cases, "shared_input": shared})


if __name__ == "__main__":
    main()
