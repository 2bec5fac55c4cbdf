"""Handing an adapter to a sampler after each step: the exported LoRA against the training step itself.

    python benchmarks/export.py -o docs/results/speed/export.json

A Llama-like model of 16 layers with random weights, hidden size 2048, a narrow MLP and a small vocabulary, so that its
attention is what costs. Query and value are adapted. ``step`` is forward, backward and an AdamW step on one batch;
``export`` is ``lorma.export.export_lora_state_dict``; ``delta`` forms the d × k update of every layer instead
(``get_delta_weight``), which is what a sampler without LoRA would need.
"""

from __future__ import annotations

from typing import Any

import torch
from harness import DEVICE, Case, Run, interleave, parse, parser, write
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from lorma import LormaConfig
from lorma.deltas.adapted import adapted_layers
from lorma.export import export_lora_state_dict

R = 16


def measure(side: str, layers: int, width: int, rows: int, tokens: int, rounds: int) -> Case:
    """One side of the multiplier."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        intermediate_size=width // 2,
        vocab_size=1024,
    )
    model: Any = get_peft_model(
        LlamaForCausalLM(config).to(DEVICE),
        LormaConfig(r=R, side=side, target_modules=["q_proj", "v_proj"], init_weights=False),
    )
    ids = torch.randint(0, 1024, (rows, tokens), device=DEVICE)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
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
    cases = [
        measure(side, layers, width, arguments.rows, arguments.tokens, arguments.rounds) for side in ("pre", "post")
    ]
    write(arguments, {"cases": cases})


if __name__ == "__main__":
    main()
