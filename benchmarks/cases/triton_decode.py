"""The update of LoRMA₊ for a few tokens on a GPU: the Triton kernel against plain PyTorch.

    python -m benchmarks.cases.triton_decode -o docs/results/speed/triton_decode.json

Both compute ``out + s·((out − bias)·Aᵀ)·Bᵀ`` from the output of a base layer, as ``lorma.kernels.low_rank`` does: plain
PyTorch in place, with factors cast to the dtype of the activations, the kernel into a new tensor, with u kept. Each is
timed as called (``plain``, ``triton``), where the host's work for a launch counts, and replayed from a CUDA graph
(``plain-graph``, ``triton-graph``), where it does not. The result holds seconds of one update, and ``speedup``: the
plain median over the kernel's. The kernel is to be used by default once that is above 1.1 on the shape of a real layer.
Without a GPU this says so and ends.
"""

from __future__ import annotations

import itertools
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import DEVICE, Case, Run, interleave, parse, parser, write
from lorma.kernels.triton_low_rank import low_rank_update

TOKENS, WIDTHS, RANKS = (1, 8), (1024, 4096), (8, 16)
DTYPES = ((torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float32))
"""Of activations and of factors, which PEFT keeps in float32 by default."""
SCALING = 2.0


def plain(out: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
    """What the library does without the kernel."""
    A, B = A.to(out.dtype), B.to(out.dtype)
    u = F.linear(out, A, None if bias is None else -(A @ bias))
    return out.addmm_(u, B.mT, alpha=SCALING)


def fused(out: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
    return low_rank_update(out, bias, A, B, SCALING, out.new_empty(len(out), len(A)))


def graph(run: Run) -> Run:
    """Replays what ``run`` launches."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        run()
    return captured.replay


def case(
    tokens: int, width: int, rank: int, dtypes: tuple[torch.dtype, torch.dtype], has_bias: bool, rounds: int
) -> Case:
    """One shape."""
    dtype, factors = dtypes
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE)

    # In place, plain PyTorch adds to the same rows again and again: factors this small keep them finite.
    A, B = (normal(rank, width) / width).to(factors), (normal(width, rank) / width).to(factors)
    out, bias = normal(tokens, width).to(dtype), normal(width).to(dtype) if has_bias else None
    runs: dict[str, Run] = {
        "plain": lambda: plain(out, bias, A, B),
        "triton": lambda: fused(out, bias, A, B),
    }
    runs |= {f"{name}-graph": graph(run) for name, run in list(runs.items())}
    results = interleave(runs, rounds, least_seconds=0.01)
    median = {name: result["seconds"]["p50"] for name, result in results.items()}
    return {
        "tokens": tokens,
        "width": width,
        "r": rank,
        "dtype": str(dtype).removeprefix("torch."),
        "factors": str(factors).removeprefix("torch."),
        "bias": has_bias,
        "speedup": {
            "called": round(median["plain"] / median["triton"], 3),
            "graph": round(median["plain-graph"] / median["triton-graph"], 3),
        },
        "results": results,
    }


def main() -> None:
    arguments = parse(parser(__doc__, rounds=51))
    missing = [name for name, there in (("CUDA", DEVICE.type == "cuda"), ("Triton", find_spec("triton"))) if not there]
    if missing:
        print(f"Nothing was measured. Missing: {', '.join(missing)}.")
        return
    widths = (64,) if arguments.quick else WIDTHS
    shapes = itertools.product(TOKENS, widths, RANKS, DTYPES, (False, True))
    with torch.inference_mode():
        write(arguments, {"updates": [case(*shape, arguments.rounds) for shape in shapes]})


if __name__ == "__main__":
    main()
