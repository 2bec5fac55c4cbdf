"""Generating one token at a time, adapters unmerged: one layer, and SmolLM2-135M.

    python -m benchmarks.cases.decode -o docs/results/speed/decode.json

``layers`` is one token through one square layer of several widths, without gradients. ``generation`` is greedy decoding
of a fixed number of tokens with a cache after a short prompt; ``seconds`` is of one token, the prompt's share included.
Mixed batches of several adapters are in ``benchmarks.cases.scaling``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.harness import DEVICE, Case, Run, contenders, interleave, parse, parser, write
from benchmarks.harness.bases import TINY, llama, smollm2
from benchmarks.harness.layers import Projections, Shape

WIDTHS = (768, 1024, 2048, 4096)
FOR_LAYERS = tuple(name for name in contenders.ALL if not name.endswith(("-auto", "-post")))
FOR_GENERATION = ("frozen", "lora", "lorma-plus", "lorma-permutation")
PROMPT = 32


def layer(width: int, rounds: int) -> Case:
    """One token through one layer."""
    torch.manual_seed(1)
    base = Projections(Shape(width, width, 1), 1, bias=False)
    x = torch.randn(1, width, device=DEVICE)
    calls: dict[str, Run] = {}
    for name in FOR_LAYERS:
        adapted = contenders.inner(contenders.build(name, base, ["p0"]).eval()).layers["p0"]
        calls[name] = partial(adapted, x)
    slow = contenders.SLOW | {"rebuild-permutation": 3}
    with torch.inference_mode():
        return {"width": width, "results": interleave(calls, rounds, every=slow, least_seconds=0.01)}


def generation(tokens: int, rounds: int, quick: bool) -> Case:
    """Greedy decoding of ``tokens`` tokens by a whole model."""
    base = llama(TINY, 1, PROMPT) if quick else smollm2(1, PROMPT)
    prompt = base.batch["input_ids"]
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(prompt),
        "do_sample": False,
        "use_cache": True,
        "min_new_tokens": tokens,
        "max_new_tokens": tokens,
        "pad_token_id": 0,
    }
    runs: dict[str, Run] = {}
    for name in FOR_GENERATION:
        model: Any = contenders.build(name, base.model, base.targets).eval()
        runs[name] = partial(model.generate, input_ids=prompt, **options)
    results = interleave(runs, rounds)
    for result in results.values():
        result["seconds"] = {name: float(f"{seconds / tokens:.6g}") for name, seconds in result["seconds"].items()}
    return {"model": "tiny" if quick else "smollm2", "prompt": PROMPT, "tokens": tokens, "results": results}


def main() -> None:
    made = parser(__doc__, rounds=21)
    made.add_argument("--tokens", type=int, default=24, help="tokens to generate")
    made.add_argument("--generation-rounds", type=int, default=7, help="timed rounds of generating")
    arguments = parse(made)
    widths = (32, 64) if arguments.quick else WIDTHS
    tokens, rounds = (4, 2) if arguments.quick else (arguments.tokens, arguments.generation_rounds)
    layers = [layer(width, arguments.rounds) for width in widths]
    write(arguments, {"layers": layers, "generation": generation(tokens, rounds, arguments.quick)})


if __name__ == "__main__":
    main()
