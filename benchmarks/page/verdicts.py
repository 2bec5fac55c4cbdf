"""What the benchmarks are held to, decided from their results.

Times are medians, over rounds, of the ratio of two contenders in one round.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

Results = dict[str, dict[str, Any]]
"""Contents of the result files, by file name without ending."""

PLUS = ("lorma-plus", "lorma-plus-auto")
PERMUTATION = {"lorma-permutation": "pre", "lorma-permutation-auto": "auto"}
MODELS = ("model_minilm", "model_smollm2")


class Value(NamedTuple):
    """One measured number and the most that it may be."""

    where: str
    value: float
    bound: float


class Line(NamedTuple):
    """A statement that holds if each of its numbers does."""

    text: str
    values: list[Value]

    @property
    def holds(self) -> bool | None:
        """None if nothing was measured."""
        return all(value.value <= value.bound for value in self.values) if self.values else None

    @property
    def nearest(self) -> Value:
        """The number that comes nearest to its bound, or exceeds it the furthest."""
        return max(self.values, key=lambda value: value.value / value.bound)


def lines(results: Results) -> list[Line]:
    """All statements, with the numbers that decide them."""
    every, close = (
        [case for case in results.get(name, {}).get("cases", []) if case["dtype"] == "float32"]
        for name in ("layer", "layer_close")
    )
    cases = close or every
    many = [case for case in cases if "lorma-plus-auto" in case["results"]]
    wide = [case for case in many if min(case["d"], case["k"]) >= 1024]
    shared = results.get("layer", {}).get("shared_input", [])
    means = {name: [value.value for value in ratios(many, [name], "lora", 1.0)] for name in PLUS}
    return [
        Line("LoRMA₊, layer: at most LoRA's time on every shape", ratios(many, PLUS, "lora", 1.0)),
        Line(
            "LoRMA₊, layer: at most 0.92 of LoRA's time in the geometric mean over shapes",
            [Value(name, math.prod(m) ** (1 / len(m)), 0.92) for name, m in means.items() if m],
        ),
        Line("LoRMA₊, layer: at most 1.15 of the frozen layer, from 1024 wide", ratios(wide, PLUS, "frozen", 1.15)),
        Line(
            "LoRMA₊, layer: at most 0.80 of rebuilding (1.25 times as fast)", ratios(every, PLUS, "rebuild-plus", 0.8)
        ),
        Line("LoRMA₊, layer: bytes kept for backward at most LoRA's", list(saved(many))),
        Line("LoRMA₊: q, k and v on one input keep it once (inputs kept)", list(inputs_kept(shared))),
        Line("LoRMAπ, layer: within 10 % of its dense floor (multiples of it)", list(floors(cases))),
        Line("LoRMAπ, layer: never slower than rebuilding", ratios(cases, PERMUTATION, "rebuild-permutation", 1.0)),
        Line("LoRMA₊, whole step of MiniLM and SmolLM2: at most LoRA's time", list(steps(results, PLUS, 1.0))),
        Line(
            "LoRMAπ, whole step of MiniLM and SmolLM2: at most 1.10 of LoRA's time",
            list(steps(results, PERMUTATION, 1.1)),
        ),
        Line("TLoRA, whole step of MiniLM and SmolLM2: at most LoRA's time", list(steps(results, ("tlora",), 1.0))),
    ]


def place(case: dict[str, Any]) -> str:
    """A case's shape, as the tables name it."""
    dtype = "" if case["dtype"] == "float32" else f", {case['dtype']}"
    return f"{case['d']} × {case['k']}, {case['b']} tokens{dtype}"


def ratios(cases: list[dict[str, Any]], names: Any, reference: str, bound: float) -> list[Value]:
    """Times of some contenders in units of another's."""
    return [
        Value(f"{name}, {place(case)}", case["results"][name]["ratio"][reference]["p50"], bound)
        for case in cases
        for name in names
        if name in case["results"] and reference in case["results"][name]["ratio"]
    ]


def saved(cases: list[dict[str, Any]]) -> Iterator[Value]:
    """Bytes of LoRMA₊ in units of LoRA's."""
    for case in cases:
        lora = case["results"]["lora"]["saved_bytes"]
        for name in PLUS:
            yield Value(f"{name}, {place(case)}", case["results"][name]["saved_bytes"] / lora, 1.0)


def inputs_kept(cases: list[dict[str, Any]]) -> Iterator[Value]:
    """How often three layers keep their one input, given that a layer alone keeps it once."""
    for case in cases:
        for name in PLUS:
            one, three = (case["results"][name][f"saved_bytes_{count}"] for count in (1, 3))
            beside = one - case["input_bytes"]
            yield Value(f"{name}, {place(case)}", (three - 3 * beside) / case["input_bytes"], 1.0)


def floors(cases: list[dict[str, Any]]) -> Iterator[Value]:
    """Times of a permutation in units of its floor."""
    for case in cases:
        for name, side in PERMUTATION.items():
            if name in case["results"]:
                ratio = case["results"][name]["ratio"]["frozen"]["p50"]
                yield Value(f"{name}, {place(case)}", ratio / case["floor"][side], 1.1)


def steps(results: Results, names: Any, bound: float) -> Iterator[Value]:
    """Whole training steps in units of LoRA's."""
    for model in MODELS:
        measured = results.get(model, {}).get("results", {})
        for name in names:
            if name in measured:
                where = f"{name}, {model.removeprefix('model_')}"
                yield Value(where, measured[name]["ratio"]["lora"]["p50"], bound)
