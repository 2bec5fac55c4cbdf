"""Whether a run learned anything: what it reached against the one answer that does best for every row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from lorma import formatting as show

SMALLER_IS_BETTER = frozenset({"mse", "loss"})


def warnings_of(summary: Mapping[str, Any]) -> list[str]:
    """What makes a run look healthier than it is, from its ``summary.json``; nothing for runs that do not record it.

    That is a single class predicted for every evaluation row, and a primary metric (or mean squared error) that is not
    better than that of ``trivial_baseline``. Each is the end of a sentence that begins with the run.
    """
    found = []
    if summary.get("predicted_classes") == 1:
        found.append("predicts one and the same class for every evaluation row")
    found += [
        f"does not beat the {summary['trivial_baseline']['name']} in {name} "
        f"({show.metric(reached)} against {show.metric(trivial)})"
        for name, reached, trivial in _compared(summary)
        if not _better(name, reached, trivial, summary)
    ]
    return found


def metric_names(summary: Mapping[str, Any]) -> dict[str, str]:
    """The final metrics of a run with the names people read: ``f1`` of two classes says of which."""
    positive = summary.get("positive_class")
    return {
        name: f"f1 of {positive!r}" if name == "f1" and positive is not None else name
        for name in summary["final_metrics"]
    }


def _compared(summary: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
    trivial = (summary.get("trivial_baseline") or {}).get("metrics", {})
    for name in dict.fromkeys((summary["primary_metric"], "mse")):
        reached = summary["final_metrics"].get(name)
        if name in trivial and name in summary["final_metrics"]:
            yield name, math.nan if reached is None else reached, trivial[name]


def _better(name: str, reached: float, trivial: float, summary: Mapping[str, Any]) -> bool:
    greater = summary["greater_is_better"] if name == summary["primary_metric"] else name not in SMALLER_IS_BETTER
    return reached > trivial if greater else reached < trivial
