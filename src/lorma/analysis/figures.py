"""Training-loss figures, drawn with Matplotlib's object interface and no global state."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lorma.analysis.convergence import default_window, final_loss, smooth
from lorma.analysis.runs import Run, tell_apart
from lorma.analysis.table import BASELINE
from lorma.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = dict[int, float]

LONG = 30
"""Letters from which the name of a method takes a row of the legend to itself."""
INK, MUTED, GRID = "#222222", "#6b6b6b", "#e6e6e6"
# Okabe and Ito's colours, which stay apart for colour-blind readers; the yellow is left out as too pale on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES: tuple[Any, ...] = ((0, (7, 1.2)), (0, (4, 1.2, 1, 1.2)), (0, (2.2, 1)), (0, (9, 1.2, 1, 1.2, 1, 1.2)), "-")


def loss_curves(runs: Sequence[Run], out_dir: str | os.PathLike[str], name: str = "loss") -> tuple[Path, Path]:
    """Draw training loss against optimizer step, one line per method, as ``name.png`` (200 dpi) and ``name.svg``.

    A line is the mean over seeds of the moving mean over :func:`default_window` of the shortest run. Behind it lies
    the range over seeds, or the loss as logged when there is one seed. A dotted line marks LoRA's final loss. A run
    is drawn up to its first loss that is not finite.

    Returns:
        The paths of the PNG and the SVG file.

    Raises:
        InputError: no runs, or no finite loss to draw.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    runs = tell_apart(runs)
    drawn = [(run, run.losses[: _finite(run)]) for run in runs if _finite(run)]
    if not drawn:
        raise InputError("no run has a finite training loss to draw")
    window = default_window(min(len(losses) for _, losses in drawn))
    groups: dict[str, list[tuple[Run, tuple[float, ...]]]] = {}
    for run, losses in drawn:
        groups.setdefault(run.method, []).append((run, losses))

    figure = Figure(figsize=(7.2, 4.3), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    handles = {}
    others = 0
    for method, group in groups.items():
        if method == BASELINE:
            colour, dashes = MUTED, "-"
        else:
            colour = _COLOURS[others % len(_COLOURS)]
            dashes = "-" if len(groups) == 1 else _DASHES[others % len(_DASHES)]
            others += 1
        handles[method] = _draw_method(axes, group, window, colour, dashes)
    if BASELINE in groups:
        _mark_final_loss(axes, fmean(final_loss(losses, default_window(len(losses))) for _, losses in groups[BASELINE]))
    _decorate(axes, runs, window)
    _add_legend(axes, handles, runs[0].summary)

    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    png, svg = out_dir / f"{name}.png", out_dir / f"{name}.svg"
    figure.savefig(png, dpi=200)
    with rc_context({"svg.hashsalt": "lorma"}):
        figure.savefig(svg, metadata={"Date": None})
    return png, svg


def _finite(run: Run) -> int:
    """How many losses come before the first one that is not finite."""
    return next((index for index, loss in enumerate(run.losses) if not math.isfinite(loss)), len(run.losses))


def _draw_method(axes: Axes, group: list[tuple[Run, tuple[float, ...]]], window: int, colour: str, dashes: Any) -> Any:
    curves: list[Curve] = [dict(zip(run.steps, smooth(losses, window), strict=False)) for run, losses in group]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    if len(curves) == 1:
        run, losses = group[0]
        axes.plot(run.steps[: len(losses)], losses, color=colour, alpha=0.22, linewidth=0.7, zorder=1)
    else:
        low = [min(curve[step] for curve in curves) for step in steps]
        high = [max(curve[step] for curve in curves) for step in steps]
        axes.fill_between(steps, low, high, color=colour, alpha=0.16, linewidth=0, zorder=1)
    mean = [fmean(curve[step] for curve in curves) for step in steps]
    marker = "o" if len(steps) == 1 else None
    (line,) = axes.plot(steps, mean, color=colour, linestyle=dashes, linewidth=1.8, marker=marker, zorder=3)
    return line


def _mark_final_loss(axes: Axes, loss: float) -> None:
    axes.axhline(loss, color=MUTED, linestyle=":", linewidth=1.0, zorder=2)
    axes.annotate(
        f"LoRA's\nfinal loss\n{loss:.3f}",
        xy=(1.0, loss),
        xycoords=axes.get_yaxis_transform(),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontsize=8.5,
        color=MUTED,
        annotation_clip=False,
    )


def _add_legend(axes: Axes, handles: dict[str, Any], summary: dict[str, Any]) -> None:
    """The methods in rows between the title and the axes, where they cover no data: four in one, or one if long."""
    columns = min(len(handles), 4 if max(map(len, handles)) < LONG else 1)
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
        labelcolor=INK,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    rows = math.ceil(len(handles) / columns)
    title = f"{_short(summary['model'])}, {_short(summary['task'])}"
    axes.set_title(title, loc="left", pad=10 + 15 * rows, fontsize=11.5, fontweight="bold", color=INK, parse_math=False)


def _decorate(axes: Axes, runs: Sequence[Run], window: int) -> None:
    spacing = {after - before for run in runs for before, after in zip(run.steps, run.steps[1:], strict=False)}
    unit = f"{window * spacing.pop()} steps" if len(spacing) == 1 else f"{window} logged points"
    smoothed = f" (moving mean over {unit})" if window > 1 else ""
    axes.set_xlabel("optimizer step", color=INK, fontsize=10)
    axes.set_ylabel(f"training loss{smoothed}", color=INK, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=9)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)


def _short(text: str, limit: int = 40) -> str:
    """The end of a long name: of a path or a hub name it is the part that tells models apart."""
    return text if len(text) <= limit else "…" + text[1 - limit :]
