"""A whole training step, forward, backward and AdamW: time, bytes kept for the backward pass, peak memory.

    python -m benchmarks.cases.model_step --model minilm -o docs/results/speed/model_minilm.json
    python -m benchmarks.cases.model_step --model smollm2 -o docs/results/speed/model_smollm2.json
    python -m benchmarks.cases.model_step --model llama-stack -o docs/results/speed/model_llama_stack.json

Query and value projections are adapted, r = 8; only the adapter trains. MiniLM reads a batch of padded film reviews,
SmolLM2-135M film reviews one after the other. ``llama-stack`` is the first layers of a Llama of the 1B class with
random weights and a vocabulary of 1,024: all 16 layers on a GPU, two on a CPU (the layers are alike, and cost alike).

The frozen floor takes no optimiser step, and a gradient runs through all of it to the embeddings' output; with an
adapter the gradient stops at the first adapted layers.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from benchmarks.harness import DEVICE, Run, contenders, interleave, parse, parser, write
from benchmarks.harness.bases import ONE_BILLION, TINY, Base, llama, minilm, smollm2
from benchmarks.harness.memory import peak_bytes, saved_bytes

SIZES = {"minilm": (32, 64), "smollm2": (4, 128), "llama-stack": (4, 128)}
ROUNDS = {"minilm": 15, "smollm2": 7, "llama-stack": 5}
NAMES = tuple(name for name in contenders.ALL if name != "lorma-plus-post")


def load(arguments: argparse.Namespace) -> Base:
    """The base model and its batch.

    Raises:
        SystemExit: the layer stack would not fit into memory.
    """
    rows, length = (2, 16) if arguments.quick else (arguments.batch, arguments.length)
    if arguments.model == "minilm":
        return minilm(rows, length)
    if arguments.quick:
        return llama(TINY, rows, length)
    if arguments.model == "smollm2":
        return smollm2(rows, length)
    free = torch.cuda.mem_get_info()[0] if DEVICE.type == "cuda" else psutil.virtual_memory().available
    needed = 2 * 4 * 61_000_000 * arguments.layers
    if needed > free:
        raise SystemExit(f"{arguments.layers} layers need about {needed / 1e9:.0f} GB, {free / 1e9:.0f} are free")
    return llama({**ONE_BILLION, "num_hidden_layers": arguments.layers}, rows, length)


def _loss(model: Any, batch: dict[str, Any]) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def step(model: nn.Module, batch: dict[str, Any]) -> Run:
    """One training step; for a frozen model, forward and backward."""
    trained = contenders.trainable(model)
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None

    def run() -> None:
        _loss(model, batch).backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()

    return run


def main() -> None:
    made = parser(__doc__, rounds=0)
    made.add_argument("--model", choices=SIZES, required=True)
    made.add_argument("--batch", type=int, help="rows of the batch")
    made.add_argument("--length", type=int, help="tokens of a row, at most")
    made.add_argument("--layers", type=int, default=16 if DEVICE.type == "cuda" else 2, help="of llama-stack")
    made.add_argument("--contenders", default=",".join(NAMES), help="which ones, by name, between commas")
    arguments = parse(made)
    arguments.rounds = arguments.rounds or (2 if arguments.quick else ROUNDS[arguments.model])
    arguments.batch = arguments.batch or SIZES[arguments.model][0]
    arguments.length = arguments.length or SIZES[arguments.model][1]
    base = load(arguments)
    names = arguments.contenders.split(",")
    models: dict[str, Any] = {name: contenders.build(name, base.model, base.targets).train() for name in names}
    if "frozen" in models:
        models["frozen"].enable_input_require_grads()
    steps = {name: step(model, base.batch) for name, model in models.items()}
    memory = {
        name: {
            **contenders.counts(model, base.model),
            "saved_bytes": saved_bytes(partial(_loss, model, base.batch), contenders.held(model)),
            "peak_bytes": peak_bytes(steps[name]),
        }
        for name, model in models.items()
    }
    times = interleave(steps, arguments.rounds, every=contenders.SLOW)
    rows, length = base.batch["input_ids"].shape
    size = {"model": arguments.model, "rows": rows, "length": length, "targets": base.targets}
    if arguments.model == "llama-stack":
        size["layers"] = arguments.layers
    write(arguments, size | {"results": {name: times[name] | memory[name] for name in names}})


if __name__ == "__main__":
    main()
