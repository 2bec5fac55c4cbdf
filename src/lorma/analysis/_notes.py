"""The sentences under a table: what the columns are, and what the numbers do not show."""

from __future__ import annotations

from collections.abc import Sequence

from lorma import formatting as show
from lorma.analysis.rows import Row
from lorma.runs.convergence import has_fallen
from lorma.runs.reading import Run


def table_notes(runs: Sequence[Run], rows: Sequence[Row], baseline: str) -> list[str]:
    """Notes for the table of ``rows``, made from ``runs``; ``baseline`` is the method compared against."""
    metric, greater = runs[0].summary["primary_metric"], runs[0].summary["greater_is_better"]
    base = next((row for row in rows if row.method == baseline), None)
    notes = [f"{'Higher' if greater else 'Lower'} {metric} is better; it is measured {_measured(runs)}."]
    notes += _seed_notes(rows)
    if base is not None:
        notes += _gap_note(rows, base, metric, greater)
    if base is None and any(run.summary["method"] == baseline for run in runs):
        notes.append("LoRA is there with several settings, so nothing is compared with it.")
    notes += _trivial_notes(runs)
    notes += _definitions(base is not None, several=any(len(row.seeds) > 1 for row in rows))
    return notes + _caveats(runs, baseline if base is not None else None)


def _trivial_notes(runs: Sequence[Run]) -> list[str]:
    """What the trivial baselines are, and whose F1 is given."""
    known = {(each["name"], each["prediction"]) for run in runs if (each := run.summary.get("trivial_baseline"))}
    notes = [f"The {name} is what answering {answer!r} for every evaluation row gives." for name, answer in known]
    classes = {name for run in runs if (name := run.summary.get("positive_class")) is not None}
    return sorted(notes) + [f"f1 is that of the class {name!r}." for name in sorted(classes)]


def _measured(runs: Sequence[Run]) -> str:
    if not any(run.keeps_best for run in runs):
        return "after the last training step"
    if not all(run.keeps_best for run in runs):
        return "on what each run saved: the best evaluation, which looks better than it is, or the last step"
    return "at each run's best evaluation, chosen on these same rows, so new data will score lower"


def _seed_notes(rows: Sequence[Row]) -> list[str]:
    single = [row.method for row in rows if len(row.seeds) == 1]
    if len(single) == len(rows):
        if len(rows) == 1:
            return ["One seed: no standard deviation is given."]
        return ["One seed per method: differences of this size can be chance; no standard deviation is given."]
    notes = ["± is the sample standard deviation over seeds."]
    if single:
        notes.append(f"Only one seed for {show.listing(single)}: no standard deviation is given there.")
    return notes


def _gap_note(rows: Sequence[Row], base: Row, metric: str, greater: bool) -> list[str]:
    """Whether the best other method and the baseline differ by more than the seeds do."""
    others = [row for row in rows if row is not base and row.metric_mean is not None]
    if not others or base.metric_mean is None:
        return []
    best = (max if greater else min)(others, key=lambda row: row.metric_mean or 0.0)
    if best.metric_mean is None or best.metric_sd is None or base.metric_sd is None:
        return []
    gap, spread = best.metric_mean - base.metric_mean, max(best.metric_sd, base.metric_sd)
    what = f"{show.metric(abs(gap))} {'above' if gap > 0 else 'below'} LoRA in {metric}" if gap else "level with LoRA"
    verdict = "more" if abs(gap) > spread else "not more"
    tail = "." if abs(gap) > spread else ", so these seeds do not separate the two."
    return [
        f"The best method besides LoRA, {best.method}, is {what}: {verdict} than the larger of the two standard "
        f"deviations ({show.metric(spread)}){tail}"
    ]


def _definitions(has_baseline: bool, several: bool) -> list[str]:
    notes = [
        "Adapter counts the trained parameters of the method itself, Head those of a new task head and of other "
        "modules that are trained whole.",
        "Loss AUC is the area under the training-loss curve over optimizer steps (trapezoidal rule, loss × steps); "
        "smaller means faster convergence.",
    ]
    if has_baseline:
        notes.append("AUC vs LoRA is the change of that area; negative means a smaller area than LoRA's.")
        notes.append(
            "Steps to LoRA's loss is the first step at which the moving mean of the training loss is at or below the "
            "final loss of the LoRA run with the same seed; the window is one twentieth of LoRA's logged points."
        )
    return [*notes, *(["Time is the mean over seeds and Peak memory the largest."] if several else [])]


def _caveats(runs: Sequence[Run], baseline: str | None) -> list[str]:
    notes = []
    has_baseline = baseline is not None
    level = [run for run in runs if run.summary["method"] == baseline and not run.diverged]
    flat = [run for run in level if not has_fallen(run.losses)]
    if flat:
        seeds = show.listing([run.seed for run in flat])
        notes.append(
            f"LoRA's training loss did not fall by more than its noise (seed {seeds}); steps to it are not given there."
        )
    if stopped := [run for run in runs if run.stopped_early]:
        which = show.listing([f"{run.method} (seed {run.seed}) at step {run.steps[-1]:,}" for run in stopped])
        notes.append(
            f"Stopped early: {which}. Runs of unlike length have no comparable area, so none is given; "
            "the time is that until the stop."
        )
    spans = {(run.steps[0], run.steps[-1]) for run in runs}
    if len(spans) > 1:
        notes.append(
            "The loss curves do not span the same steps, so their areas are not comparable"
            + ("; the change against LoRA is given only where they do." if has_baseline else ".")
        )
    if diverged := [f"{run.method} (seed {run.seed})" for run in runs if run.diverged]:
        notes.append(f"The training loss stopped being a finite number in {show.listing(diverged)}; no area is given.")
    rates = {run.summary.get("learning_rate") for run in runs}
    methods = {run.summary["method"] for run in runs}
    if len(rates) > 1 and len(methods) > 1:
        notes.append("The learning rates differ; part of a difference between methods may be due to that.")
    if len({run.summary.get("r") for run in runs} - {None}) > 1 and len(methods) > 1:
        notes.append("r means something else for each method (`lorma methods`); compare the parameters.")
    devices = list(dict.fromkeys(str(run.summary.get("device") or "unknown") for run in runs))
    if len(devices) > 1:
        notes.append(f"The runs used different devices ({'; '.join(devices)}); time and memory are not comparable.")
    return notes
