"""Runs into one row per method: quality, size, convergence and cost, each with what it means."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from lorma import formatting as show
from lorma.analysis._notes import table_notes
from lorma.analysis.rows import Row
from lorma.errors import InputError
from lorma.runs.convergence import auc_change, default_window, final_loss, has_fallen, loss_auc, steps_to_reach
from lorma.runs.reading import Run, label_runs
from lorma.runs.trivial import warnings_of

BASELINE = "lora"
SETTINGS = {"r": "r", "learning_rate": "Learning rate"}
"""Settings of a method that are shown where methods differ in them, with the names of their columns."""


@dataclass(frozen=True)
class Trivial:
    """A trivial baseline: its name, the one answer it gives, and its primary metric."""

    name: str
    prediction: str
    metric: float


@dataclass(frozen=True)
class Table:
    """A comparison of methods on one task, model and primary metric.

    ``trivial`` is what the evaluation rows give away (several where runs were evaluated on different rows, none where
    the runs do not tell), and ``warnings`` names the runs that learned no more than that.
    """

    task: str
    model: str
    primary_metric: str
    greater_is_better: bool
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    trivial: tuple[Trivial, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def has_baseline(self) -> bool:
        """Whether one of the rows is LoRA."""
        return any(row.method == BASELINE for row in self.rows)

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows as text for people, results first.

        The two columns against LoRA are there only when LoRA is, r and the learning rate only where they differ.
        """
        arrow = "↑" if self.greater_is_better else "↓"
        header = ["Method", f"{self.primary_metric} {arrow}", "Loss AUC ↓"]
        if self.has_baseline:
            header += ["AUC vs LoRA", "Steps to LoRA's loss"]
        header += ["Seeds", *self._own, "Adapter", "Head", "Time", "Peak memory"]
        beaten = [[each.name, show.metric(each.metric)] for each in self.trivial]
        return header, [
            *(self._cells(row) for row in self.rows),
            *(line + [show.MISSING] * (len(header) - len(line)) for line in beaten),
        ]

    @property
    def _own(self) -> list[str]:
        """Columns of settings in which the methods differ."""
        return [SETTINGS[key] for key in SETTINGS if differs(self.rows, key)]

    def _cells(self, row: Row) -> list[str]:
        cells = [row.method, show.metric(row.metric_mean, row.metric_sd), show.area(row.loss_auc)]
        if self.has_baseline:
            cells += ["baseline" if row.method == BASELINE else show.percent(row.auc_change_percent), _reach_text(row)]
        return [
            *cells,
            str(len(row.seeds)),
            *(show.setting(getattr(row, key)) for key in SETTINGS if differs(self.rows, key)),
            show.count(row.adapter_parameters),
            show.count(row.head_parameters),
            show.seconds(row.seconds),
            show.memory(row.peak_memory_bytes),
        ]

    def to_markdown(self) -> str:
        """A pipe table with its notes as a list below."""
        header, rows = self.cells()
        table = [[cell.replace("|", "\\|") for cell in line] for line in (header, *rows)]
        widths = [max(3, *(len(line[i]) for line in table)) for i in range(len(header))]
        rule = [("-" * width) if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
        lines = [
            [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
            for line in table
        ]
        lines.insert(1, rule)
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        warnings = "".join(f"**Warning:** {warning}\n\n" for warning in self.warnings)
        return f"{text}\n\n{warnings}" + "".join(f"- {note}\n" for note in self.notes)

    def to_json(self) -> dict[str, Any]:
        """A plain dict of raw numbers (units as in :class:`Row`), None where a number does not exist."""
        return {"schema_version": 1} | asdict(self)


def differs(rows: Iterable[Row], key: str) -> bool:
    """Whether methods have different values of a setting; methods that lack it do not count."""
    return len({value for row in rows if (value := getattr(row, key)) is not None}) > 1


def build_table(runs: Sequence[Run]) -> Table:
    """Aggregate runs into one row per method and recipe, in the order in which they first appear.

    The change of the area against LoRA is the mean of per-seed changes when both methods have the same seeds, else
    the change of the mean areas; it is None when the curves do not span the same steps.

    Raises:
        InputError: no runs; two runs of different task, model or primary metric; one method, seed and recipe twice; or
            one method and recipe with different parameter counts.
    """
    if not runs:
        raise InputError("runs is empty; a table needs at least one run")
    runs = label_runs(runs)
    for run in runs[1:]:
        _check_same(runs[0], run, "task", "model", "primary_metric", "greater_is_better")
    groups: dict[str, list[Run]] = {}
    for run in runs:
        group = groups.setdefault(run.method, [])
        for other in group:
            if other.seed == run.seed:
                both = f"{other.path} and {run.path} are both method {run.method!r} with seed {run.seed}"
                raise InputError(f"{both} and the same settings; a table takes such a run once")
            _check_same(other, run, "trainable_parameters", "adapter_parameters")
        group.append(run)
    baseline = groups.get(BASELINE, [])
    # A run that stopped early has a smaller area for that alone.
    unlike = any(run.stopped_early for run in runs) and len({(run.steps[0], run.steps[-1]) for run in runs}) > 1
    rows = tuple(_row(group, baseline, areas=not unlike) for group in groups.values())
    summary = runs[0].summary
    notes = table_notes(runs, rows, BASELINE)
    return Table(
        task=summary["task"],
        model=summary["model"],
        primary_metric=summary["primary_metric"],
        greater_is_better=summary["greater_is_better"],
        rows=rows,
        notes=tuple(notes),
        trivial=trivial_baselines(runs),
        warnings=tuple(_warnings(groups.values())),
    )


def trivial_baselines(runs: Sequence[Run]) -> tuple[Trivial, ...]:
    """The different trivial baselines that the runs record, in the order of their runs."""
    found = {}
    for run in runs:
        known = run.summary.get("trivial_baseline")
        if known and (value := known["metrics"].get(run.summary["primary_metric"])) is not None:
            trivial = Trivial(known["name"], known["prediction"], value)
            found[trivial] = trivial
    return tuple(found)


def _warnings(groups: Iterable[list[Run]]) -> Iterable[str]:
    for group in groups:
        for run in group:
            which = run.method if len(group) == 1 else f"{run.method} (seed {run.seed})"
            if found := warnings_of(run.summary):
                yield f"{which} {' and '.join(found)}."


def _check_same(first: Run, second: Run, *keys: str) -> None:
    for key in keys:
        one, two = first.summary.get(key), second.summary.get(key)
        if one != two:
            raise InputError(
                f"{first.path} has {key}={one!r} but {second.path} has {key}={two!r}; compare like with like"
            )


def _row(group: list[Run], baseline: list[Run], areas: bool) -> Row:
    summary = group[0].summary
    metrics = [run.primary for run in group]
    seeds_by_baseline = {run.seed: run for run in baseline}
    pairs = [(run, seeds_by_baseline[run.seed]) for run in group if run.seed in seeds_by_baseline]
    compared = [(run, base) for run, base in pairs if not base.diverged and has_fallen(base.losses)]
    reached = [step for run, base in compared if (step := _reach(run, base)) is not None]
    memory = [value for run in group if (value := run.summary.get("peak_memory_bytes")) is not None]
    return Row(
        method=group[0].method,
        seeds=tuple(run.seed for run in group),
        trainable_parameters=summary["trainable_parameters"],
        adapter_parameters=summary["adapter_parameters"],
        head_parameters=summary["trainable_parameters"] - summary["adapter_parameters"],
        r=summary.get("r"),
        learning_rate=summary.get("learning_rate"),
        metric_mean=_mean(metrics),
        metric_sd=stdev(metrics) if len(metrics) >= 2 and _mean(metrics) is not None else None,
        loss_auc=_mean(map(_area, group)) if areas else None,
        auc_change_percent=_change(group, baseline),
        steps_to_lora_loss=_mean(reached),
        seeds_reached=len(reached),
        seeds_compared=len(compared),
        seconds=fmean(run.summary["seconds"] for run in group),
        peak_memory_bytes=max(memory, default=None),
    )


def _mean(values: Iterable[float]) -> float | None:
    """The mean, or None when there is nothing to average or a value is not finite."""
    numbers = list(values)
    return fmean(numbers) if numbers and all(map(math.isfinite, numbers)) else None


def _area(run: Run) -> float:
    return math.nan if run.diverged else loss_auc(run.steps, run.losses)


def _reach(run: Run, base: Run) -> float | None:
    if run.diverged:
        return None
    window = default_window(len(base.losses))
    return steps_to_reach(run.steps, run.losses, final_loss(base.losses, window), window)


def _change(group: list[Run], baseline: list[Run]) -> float | None:
    if len({(run.steps[0], run.steps[-1]) for run in (*group, *baseline)}) != 1:
        return None
    areas = {run.seed: _area(run) for run in group}
    base = {run.seed: _area(run) for run in baseline}
    if (
        not base
        or not all(map(math.isfinite, areas.values()))
        or not all(0 < area < math.inf for area in base.values())
    ):
        return None
    if areas.keys() == base.keys():
        return fmean(auc_change(areas[seed], base[seed]) for seed in areas)
    return auc_change(fmean(areas.values()), fmean(base.values()))


def _reach_text(row: Row) -> str:
    if row.seeds_compared == 0:
        return show.MISSING
    if row.steps_to_lora_loss is None:
        return "not reached"
    steps = f"{row.steps_to_lora_loss:,.0f}"
    return (
        steps if row.seeds_reached == row.seeds_compared else f"{steps} ({row.seeds_reached} of {row.seeds_compared})"
    )
