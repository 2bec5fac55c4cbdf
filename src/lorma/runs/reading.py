"""A finished run directory, read into numbers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lorma.errors import InputError, reading
from lorma.yaml_text import load_yaml

SCHEMA_VERSION = 1

_REQUIRED: dict[str, type | tuple[type, ...]] = {
    "method": str,
    "task": str,
    "model": str,
    "seed": int,
    "trainable_parameters": int,
    "adapter_parameters": int,
    "steps": int,
    "primary_metric": str,
    "greater_is_better": bool,
    "final_metrics": dict,
    "seconds": (int, float),
}
_NO_SETTING = {
    "method",
    "method.name",
    "seed",
    "output",
    "train.eval_batch_size",
    "train.eval_steps",
    "train.save_steps",
    "train.report_to",
}
"""Keys of a recipe that are told otherwise, or do not change what is trained; nor does its section ``compare``."""

_LATER = {"train.keep": "last", "train.early_stopping": None}
"""What keys that the recipes of earlier versions lack mean there."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation during training: the optimizer step and the metrics, named without the ``eval_`` prefix."""

    step: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Run:
    """One finished run: ``summary.json`` as written, and the curves of ``metrics.jsonl``.

    ``steps`` (strictly increasing optimizer steps) and ``losses`` are equally long and never empty. A loss that the
    run recorded as not finite stays so here. ``settings`` are the values of its recipe, by keys such as
    ``train.learning_rate``; ``label`` is what it is called instead of its method, see :func:`label_runs`.
    """

    path: Path
    summary: dict[str, Any]
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    evaluations: tuple[Evaluation, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    label: str | None = None

    @property
    def method(self) -> str:
        return self.label or str(self.summary["method"])

    @property
    def seed(self) -> int:
        return int(self.summary["seed"])

    @property
    def primary(self) -> float:
        """The primary metric of the saved weights, in the metric's own units; NaN when it is not defined."""
        value = self.summary["final_metrics"][self.summary["primary_metric"]]
        return math.nan if value is None else float(value)

    @property
    def keeps_best(self) -> bool:
        """Whether the saved weights, and so :attr:`primary`, are those of the best evaluation."""
        return bool(self.settings.get("train.keep") == "best")

    @property
    def stopped_early(self) -> bool:
        """Whether the run ended before its planned steps because it no longer improved."""
        return bool(self.summary.get("stopped_early", False))

    @property
    def diverged(self) -> bool:
        """Whether some logged training loss is not finite."""
        return not all(map(math.isfinite, self.losses))


@reading()
def load_run(path: str | os.PathLike[str]) -> Run:
    """Read the directory of a finished run.

    When a run was resumed it may log steps for a second time; the later lines replace the earlier ones. A last line
    of ``metrics.jsonl`` without its line end is what a killed process leaves, and is ignored when it is not readable.

    Raises:
        InputError: no such directory, one that may not be read, a run that is not finished, a schema version other
            than 1, a missing or mistyped key, a broken line (with its number), or no training loss at all.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: not a run directory")
    summary = _read_summary(path / "summary.json")
    steps, losses, evaluations = _read_metrics(path / "metrics.jsonl")
    return Run(path, summary, steps, losses, evaluations, _read_settings(path / "recipe.yaml", summary))


def label_runs(runs: Sequence[Run]) -> list[Run]:
    """The runs, those of one method with different recipes called by what differs.

    ``lorma-plus (train.learning_rate=0.001)`` is such a label. A method whose runs differ in nothing but their seeds
    keeps its name.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(str(run.summary["method"]), []).append(run)
    different = {
        method: [
            key
            for key in dict.fromkeys(key for run in group for key in run.settings)
            if any(run.settings.get(key) != group[0].settings.get(key) for run in group)
        ]
        for method, group in groups.items()
    }
    return [replace(run, label=_label(run, different[str(run.summary["method"])])) for run in runs]


def _label(run: Run, keys: Iterable[str]) -> str | None:
    shown = ", ".join(f"{key}={run.settings.get(key)}" for key in keys)
    return f"{run.summary['method']} ({shown})" if shown else None


def _read_settings(file: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """The recipe's values by their keys; of a run without a recipe what its summary tells of it."""
    if not file.is_file():
        told = {"adapter.r": summary.get("r"), "train.learning_rate": summary.get("learning_rate")}
        return {key: value for key, value in told.items() if value is not None}
    try:
        recipe = load_yaml(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: {error}") from None
    if not isinstance(recipe, dict):
        raise InputError(f"{file}: must hold keys and values")
    settings: dict[str, Any] = {}
    for section, values in recipe.items():
        if section != "compare":
            settings |= (
                {f"{section}.{k}": v for k, v in values.items()} if isinstance(values, dict) else {section: values}
            )
    settings = _LATER | settings
    return {key: value for key, value in settings.items() if key not in _NO_SETTING}


def _read_summary(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise InputError(f"{file.parent}: unfinished; run `lorma train` again to resume it (it has no summary.json)")
    try:
        summary = json.loads(file.read_bytes())
    except ValueError as error:
        raise InputError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(summary, dict):
        raise InputError(f"{file}: must hold a JSON object")
    if summary.get("schema_version") != SCHEMA_VERSION:
        found = summary.get("schema_version")
        raise InputError(f"{file}: schema_version={found!r} is not known; this version reads {SCHEMA_VERSION}")
    if missing := [key for key in _REQUIRED if key not in summary]:
        raise InputError(f"{file}: missing {', '.join(missing)}")
    for key, kind in _REQUIRED.items():
        if not isinstance(summary[key], kind):
            names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise InputError(f"{file}: {key}={summary[key]!r} must be of type {names}")
    for name, value in summary["final_metrics"].items():
        if not (value is None or isinstance(value, (int, float))):
            raise InputError(f"{file}: final_metrics.{name}={value!r} must be a number")
    if summary["primary_metric"] not in summary["final_metrics"]:
        known = ", ".join(sorted(summary["final_metrics"])) or "none"
        raise InputError(f"{file}: primary_metric={summary['primary_metric']!r} is not among final_metrics ({known})")
    return summary


def _read_metrics(file: Path) -> tuple[tuple[int, ...], tuple[float, ...], tuple[Evaluation, ...]]:
    if not file.is_file():
        raise InputError(f"{file.parent}: has no metrics.jsonl")
    points: list[tuple[int, float]] = []
    evaluations: list[Evaluation] = []
    for number, entry in _entries(file):
        step = entry.get("step")
        if not isinstance(step, int):
            raise InputError(f"{file}, line {number}: step={step!r} must be a whole number")
        if "loss" in entry:
            _drop_from(points, evaluations, step)
            points.append((step, _number(entry["loss"], "loss", file, number)))
        metrics = {key[5:]: _number(value, key, file, number) for key, value in entry.items() if key[:5] == "eval_"}
        if metrics:
            _drop_from([], evaluations, step)
            evaluations.append(Evaluation(step, metrics))
    if not points:
        raise InputError(f"{file}: holds no training loss")
    steps, losses = zip(*points, strict=True)
    return steps, losses, tuple(evaluations)


def _drop_from(points: list[tuple[int, float]], evaluations: list[Evaluation], step: int) -> None:
    """Forget what was logged at ``step`` and later: the run went back to a checkpoint and does it again."""
    while points and points[-1][0] >= step:
        points.pop()
    while evaluations and evaluations[-1].step >= step:
        evaluations.pop()


def _entries(file: Path) -> list[tuple[int, dict[str, Any]]]:
    lines = file.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            raise InputError(f"{file}, line {number}: not valid JSON") from None
        if not isinstance(entry, dict):
            raise InputError(f"{file}, line {number}: must be a JSON object")
        found.append((number, entry))
    return found


def _number(value: object, key: str, file: Path, line: int) -> float:
    if value is None:
        return math.nan
    if not isinstance(value, (int, float)):
        raise InputError(f"{file}, line {line}: {key}={value!r} must be a number")
    return float(value)
