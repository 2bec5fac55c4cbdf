"""Merging an adapter, taking it out again, and loading one from disk.

    python -m benchmarks.cases.adapters -o docs/results/speed/adapters.json

Merging and unmerging change the weights in place (PEFT's ``merge_adapter`` and ``unmerge_adapter``), so every contender
has weights of its own. ``lorma-…/inverse`` undoes a merge algebraically instead of keeping a copy of the weight.
Loading is ``PeftModel.from_pretrained`` on a base model that is there already. ``smollm2-shape`` has SmolLM2-135M's
layers with random weights.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from benchmarks.harness import Case, Run, contenders, interleave, parse, parser, write
from benchmarks.harness.bases import SMOLLM2, TINY, Base, llama, minilm
from benchmarks.harness.layers import Projections, Shape

NAMES = ("lora", "dora", "hira", "lorma-plus", "lorma-permutation")
WITH_INVERSE = ("lorma-plus/inverse", "lorma-permutation/inverse")
SHAPES = (Shape(1024, 1024, 1), Shape(4096, 1024, 1))


def merging(base: Base, rounds: int) -> dict[str, Case]:
    """Times of merging and of unmerging."""
    models: dict[str, Any] = {}
    for name in NAMES + WITH_INVERSE:
        own = copy.deepcopy(base.model)
        models[name] = contenders.build(name.partition("/")[0], own, base.targets).eval()
    merge: dict[str, Run] = {name: _merge(model, "inverse" in name) for name, model in models.items()}
    unmerge: dict[str, Run] = {name: model.unmerge_adapter for name, model in models.items()}
    merged = interleave(merge, rounds, reset=unmerge)
    for run in merge.values():
        run()
    return {"merge": merged, "unmerge": interleave(unmerge, rounds, reset=merge)}


def _merge(model: Any, inverse: bool) -> Run:
    return lambda: model.merge_adapter(undo="inverse") if inverse else model.merge_adapter()


def loading(base: Base, folder: Path, rounds: int) -> dict[str, Case]:
    """Time of putting a saved adapter on a base model."""
    loads, resets = {}, {}
    for name in NAMES:
        model: Any = contenders.build(name, base.model, base.targets)
        model.save_pretrained(folder / name)
        loads[name], resets[name] = _loader(base, folder / name)
    return interleave(loads, rounds, reset=resets)


def _loader(base: Base, folder: Path) -> tuple[Run, Callable[[], None]]:
    fresh: list[Any] = [contenders.shared_copy(base.model)]

    def load() -> None:
        PeftModel.from_pretrained(fresh.pop(), folder)

    return load, lambda: fresh.append(contenders.shared_copy(base.model))


def bases(quick: bool) -> dict[str, Base]:
    """Layers and models to merge into."""
    shapes = (Shape(48, 32, 1),) if quick else SHAPES
    layers = {f"{s.d} × {s.k}": Base(Projections(s, 1, bias=False), ["p0"], {}) for s in shapes}
    models = {"minilm": minilm(1, 8), "smollm2-shape": llama(TINY if quick else SMOLLM2, 1, 8)}
    return layers | models


def main() -> None:
    arguments = parse(parser(__doc__, rounds=5))
    torch.manual_seed(1)
    cases = []
    for name, base in bases(arguments.quick).items():
        case: Case = {"base": name, **merging(base, arguments.rounds)}
        if base.batch:
            with tempfile.TemporaryDirectory() as folder:
                case["load"] = loading(base, Path(folder), arguments.rounds)
        cases.append(case)
    write(arguments, {"cases": cases})


if __name__ == "__main__":
    main()
