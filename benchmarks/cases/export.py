"""Handing an adapter to a sampler after each step: the exported LoRA against the training step itself.

    python -m benchmarks.cases.export -o docs/results/speed/export.json

A Llama-like model of 16 layers with random weights, hidden size 2048, a narrow MLP and a small vocabulary, so that its
attention is what costs. Query and value are adapted. ``step`` is forward, backward and an AdamW step on one batch;
``export`` is ``lorma.export.export_lora_state_dict``; ``delta`` forms the d × k update of every layer instead
(``get_delta_weight``), which is what a sampler without LoRA would need.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.harness import Case, Run, contenders, interleave, parse, parser, write
from benchmarks.harness.bases import llama
from lorma.deltas.adapted import adapted_layers
from lorma.export import export_lora_state_dict

R = 16
METHODS = {"pre": "lorma-plus", "post": "lorma-plus-post"}


def measure(side: str, layers: int, width: int, rows: int, tokens: int, rounds: int) -> Case:
    """One side of the multiplier."""
    heads = width // 64
    size = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": width // 2,
    }
    base = llama(size, rows, tokens)
    model: Any = contenders.build(METHODS[side], base.model, base.targets, R)
    optimizer = torch.optim.AdamW(contenders.trainable(model), lr=1e-4)

    def step() -> None:
        model(**base.batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def delta() -> None:
        for _, layer in adapted_layers(model, "default"):
            layer.get_delta_weight("default")

    runs: dict[str, Run] = {"step": step, "export": lambda: export_lora_state_dict(model), "delta": delta}
    results = interleave(runs, rounds)
    sizes = {"layers": layers, "width": width, "rows": rows, "tokens": tokens, "r": R, "side": side}
    return {**sizes, "results": results}


def main() -> None:
    made = parser(__doc__, rounds=5)
    made.add_argument("--rows", type=int, default=1, help="rows of a batch")
    made.add_argument("--tokens", type=int, default=128, help="tokens of a row")
    arguments = parse(made)
    layers, width = (2, 128) if arguments.quick else (16, 2048)
    cases = [measure(side, layers, width, arguments.rows, arguments.tokens, arguments.rounds) for side in METHODS]
    write(arguments, {"cases": cases})


if __name__ == "__main__":
    main()
