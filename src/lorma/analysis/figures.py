"""Figures of training and evaluation, drawn with Matplotlib's object interface and no global state."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lorma.analysis.table import BASELINE, trivial_baselines
from lorma.errors import InputError
from lorma.runs.convergence import default_window, final_loss, smooth
from lorma.runs.reading import Run, label_runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = Mapping[int, float]

LONG = 30
"""Letters from which the name of a method takes a row of the legend to itself."""


@dataclass(frozen=True)
class Theme:
    """Colours for a page of one brightness; the figure itself has no background."""

    ink: str
    muted: str
    grid: str
    lines: tuple[str, ...]


# Okabe and Ito's colours, which stay apart for colour-blind readers; the yellow is left out as too pale on white.
# On a dark page the same hues are lighter, or blue and green would sink into it.
THEMES = {
    "light": Theme("#222222", "#6b6b6b", "#e6e6e6", ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")),
    "dark": Theme("#e7eaec", "#a3abb3", "#343a40", ("#4FA8E8", "#FF8A4C", "#35C99A", "#E8A3CB", "#F5C04A", "#B5DDF7")),
}
_DASHES: tuple[Any, ...] = ((0, (7, 1.2)), (0, (4, 1.2, 1, 1.2)), (0, (2.2, 1)), (0, (9, 1.2, 1, 1.2, 1, 1.2)), "-")
_MARKERS = ("s", "^", "D", "v", "P", "X")


@dataclass(frozen=True)
class _Look:
    """How one method is drawn, the same in every figure of a report."""

    colour: str
    dashes: Any
    marker: str


def loss_curves(
    runs: Sequence[Run],
    out_dir: str | os.PathLike[str],
    name: str = "loss",
    *,
    theme: str = "light",
    narrow: bool = False,
) -> tuple[Path, Path]:
    """Draw training loss against optimizer step, one line per method, as ``name.png`` (200 dpi) and ``name.svg``.

    A line is the mean over seeds of the moving mean over :func:`default_window` of the shortest run. Behind it lies
    the range over seeds, or the loss as logged when there is one seed. A dotted line marks LoRA's final loss. A run
    is drawn up to its first loss that is not finite.

    Args:
        theme: the page it will lie on, ``light`` or ``dark``; the background is transparent.
        narrow: for a page of a phone's width.

    Returns:
        The paths of the PNG and the SVG file.

    Raises:
        InputError: no runs, no finite loss to draw, or a theme that there is not.
    """
    colours, runs = _theme(theme), label_runs(runs)
    drawn = [(run, run.losses[: _finite(run)]) for run in runs if _finite(run)]
    if not drawn:
        raise InputError("no run has a finite training loss to draw")
    window = default_window(min(len(losses) for _, losses in drawn))
    groups: dict[str, list[tuple[Run, tuple[float, ...]]]] = {}
    for run, losses in drawn:
        groups.setdefault(run.method, []).append((run, losses))

    figure, axes = _empty(narrow)
    looks, handles = _looks(runs, colours), {}
    for method, group in groups.items():
        curves = [dict(zip(run.steps, smooth(losses, window), strict=False)) for run, losses in group]
        if len(group) == 1:
            run, losses = group[0]
            axes.plot(run.steps[: len(losses)], losses, color=looks[method].colour, alpha=0.3, linewidth=0.7, zorder=1)
        handles[method] = _draw_method(axes, curves, looks[method], marked=False)
    if BASELINE in groups:
        loss = fmean(final_loss(losses, default_window(len(losses))) for _, losses in groups[BASELINE])
        _mark(axes, loss, f"LoRA's\nfinal loss\n{loss:.3f}", colours)
    spacing = {after - before for run in runs for before, after in zip(run.steps, run.steps[1:], strict=False)}
    unit = f"{window * spacing.pop()} steps" if len(spacing) == 1 else f"{window} logged points"
    smoothed = f" (moving mean over {unit})" if window > 1 else ""
    _decorate(axes, f"training loss{smoothed}", colours)
    _add_legend(axes, handles, runs[0].summary, colours, narrow)
    return _save(figure, Path(out_dir), name)


def evaluation_curves(
    runs: Sequence[Run],
    out_dir: str | os.PathLike[str],
    name: str = "evaluation",
    *,
    theme: str = "light",
    narrow: bool = False,
) -> tuple[Path, Path] | None:
    """Draw the primary metric on the evaluation rows against optimizer step, one line per method, as PNG and SVG.

    A line joins the means over seeds at the steps at which every seed was evaluated, and a band is the range over
    seeds. A dotted line marks the trivial baseline where the runs record one.

    Args:
        theme, narrow: as for :func:`loss_curves`.

    Returns:
        The paths of the PNG and the SVG file, or None when no run has a finite value of the metric to draw.

    Raises:
        InputError: no runs, or a theme that there is not.
    """
    colours, runs = _theme(theme), label_runs(runs)
    groups: dict[str, list[Curve]] = {}
    for run in runs:
        if curve := evaluation_curve(run):
            groups.setdefault(run.method, []).append(curve)
    if not groups:
        return None
    figure, axes = _empty(narrow)
    looks, metric = _looks(runs, colours), runs[0].summary["primary_metric"]
    handles = {method: _draw_method(axes, curves, looks[method], marked=True) for method, curves in groups.items()}
    for trivial in trivial_baselines(runs):
        _mark(axes, trivial.metric, f"{trivial.name.replace(' ', chr(10))}\n{trivial.metric:.3f}", colours)
    _decorate(axes, f"evaluation {metric}", colours)
    _add_legend(axes, handles, runs[0].summary, colours, narrow)
    return _save(figure, Path(out_dir), name)


def evaluation_curve(run: Run) -> Curve:
    """The finite values of the primary metric of a run by the optimizer step at which they were measured."""
    metric = run.summary["primary_metric"]
    found = {evaluation.step: evaluation.metrics.get(metric, math.nan) for evaluation in run.evaluations}
    return {step: value for step, value in found.items() if math.isfinite(value)}


def _theme(name: str) -> Theme:
    if name not in THEMES:
        raise InputError(f"theme={name!r} is unknown; allowed: {', '.join(THEMES)}")
    return THEMES[name]


def _looks(runs: Sequence[Run], theme: Theme) -> dict[str, _Look]:
    """LoRA is grey and solid, every other method has a colour, a dash and a marker of its own."""
    methods = list(dict.fromkeys(run.method for run in runs))
    looks = {BASELINE: _Look(theme.muted, "-", "o")}
    for position, method in enumerate(method for method in methods if method != BASELINE):
        dashes = "-" if len(methods) == 1 else _DASHES[position % len(_DASHES)]
        colour, marker = theme.lines[position % len(theme.lines)], _MARKERS[position % len(_MARKERS)]
        looks[method] = _Look(colour, dashes, marker)
    return looks


def _empty(narrow: bool) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.9, 3.9) if narrow else (7.2, 4.3), layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    return figure, axes


def _save(figure: Figure, out_dir: Path, name: str) -> tuple[Path, Path]:
    from matplotlib import rc_context

    out_dir.mkdir(parents=True, exist_ok=True)
    png, svg = out_dir / f"{name}.png", out_dir / f"{name}.svg"
    figure.savefig(png, dpi=200)
    with rc_context({"svg.hashsalt": "lorma"}):
        figure.savefig(svg, metadata={"Date": None})
    return png, svg


def _finite(run: Run) -> int:
    """How many losses come before the first one that is not finite."""
    return next((index for index, loss in enumerate(run.losses) if not math.isfinite(loss)), len(run.losses))


def _draw_method(axes: Axes, curves: Sequence[Curve], look: _Look, marked: bool) -> Any:
    """The mean of the curves where all of them have points and, of several, the range behind it."""
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    if len(curves) > 1:
        low, high = ([choose(curve[step] for curve in curves) for step in steps] for choose in (min, max))
        axes.fill_between(steps, low, high, color=look.colour, alpha=0.16, linewidth=0, zorder=1)
        if len(steps) == 1:
            axes.vlines(steps, low, high, color=look.colour, alpha=0.5, linewidth=1.2, zorder=1)
    mean = [fmean(curve[step] for curve in curves) for step in steps]
    marker = look.marker if marked or len(steps) == 1 else None
    size = 4 if len(steps) < 20 else 2.5
    style = {"color": look.colour, "linestyle": look.dashes, "linewidth": 1.8}
    (line,) = axes.plot(steps, mean, marker=marker, markersize=size, zorder=3, **style)
    return line


def _mark(axes: Axes, value: float, text: str, theme: Theme) -> None:
    """A dotted line across, named at its right end."""
    axes.axhline(value, color=theme.muted, linestyle=":", linewidth=1.0, zorder=2)
    axes.annotate(
        text,
        xy=(1.0, value),
        xycoords=axes.get_yaxis_transform(),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontsize=8.5,
        color=theme.muted,
        annotation_clip=False,
    )


def _add_legend(axes: Axes, handles: dict[str, Any], summary: dict[str, Any], theme: Theme, narrow: bool) -> None:
    """The methods in rows between the title and the axes, where they cover no data: four in one, or one if long."""
    longest = max(map(len, handles))
    columns = min(len(handles), 1 if longest >= LONG else 4 if not narrow else 2 if longest < LONG / 2 else 1)
    legend = axes.legend(
        list(handles.values()),
        list(handles),
        loc="lower left",
        bbox_to_anchor=(0, 1.02),
        borderaxespad=0,
        borderpad=0,
        ncols=columns,
        frameon=False,
        handlelength=3.05,
        columnspacing=1.6,
        fontsize=9.5,
        labelcolor=theme.ink,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    rows = math.ceil(len(handles) / columns)
    limit = 20 if narrow else 40
    title = f"{_short(summary['model'], limit)}, {_short(summary['task'], limit)}"
    axes.set_title(
        title, loc="left", pad=10 + 15 * rows, fontsize=11.5, fontweight="bold", color=theme.ink, parse_math=False
    )


def _decorate(axes: Axes, values: str, theme: Theme) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("optimizer step", color=theme.ink, fontsize=10)
    axes.set_ylabel(values, color=theme.ink, fontsize=10, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.muted)
    axes.tick_params(colors=theme.muted, labelcolor=theme.ink, labelsize=9)
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)


def _short(text: str, limit: int) -> str:
    """The end of a long name: of a path or a hub name it is the part that tells models apart."""
    return text if len(text) <= limit else "…" + text[1 - limit :]
