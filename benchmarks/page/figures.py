"""The figures of docs/speed.md, drawn with Matplotlib's object interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from benchmarks.page.verdicts import PERMUTATION, place

INK, MUTED, GRID = "#222222", "#6b6b6b", "#e6e6e6"
COLOURS = {
    "frozen": "#9a9a9a",
    "lora": "#222222",
    "dora": "#CC79A7",
    "hira": "#E69F00",
    "rebuild-plus": "#7fc8ad",
    "rebuild-permutation": "#009E73",
    "lorma-plus": "#0072B2",
    "lorma-plus-auto": "#56B4E9",
    "lorma-permutation": "#D55E00",
    "lorma-permutation-auto": "#f0a27a",
}
"""Okabe and Ito's colours; lighter shades for a method's other form."""
LINES = {"frozen": ":", "lora": "-", "dora": (0, (4, 1.2)), "rebuild-permutation": (0, (4, 1.2, 1, 1.2))}
BARS = tuple(name for name in COLOURS if name != "frozen")
AXES = {"tokens": "tokens", "width": "width of a square layer", "rank": "rank r", "adapters": "adapters in the batch"}


def scaling(content: dict[str, Any], path: Path) -> None:
    """Median times against each quantity, both axes logarithmic."""
    figure = Figure(figsize=(9, 6.4), layout="constrained", facecolor="white")
    handles: dict[str, Any] = {}
    for axes, (axis, label) in zip(figure.subplots(2, 2).flat, AXES.items(), strict=True):
        cases = content["axes"][axis]
        values = [case["value"] for case in cases]
        for name in cases[0]["results"]:
            times = [1e3 * case["results"][name]["seconds"]["p50"] for case in cases]
            style = {"color": COLOURS[name], "linestyle": LINES.get(name, "-"), "linewidth": 1.6}
            line = axes.plot(values, times, marker="o", markersize=3, **style)[0]
            handles.setdefault(name, line)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(values, [f"{value:,}" for value in values])
        axes.set_xlabel(label, color=INK, fontsize=9.5)
        axes.set_ylabel("ms, prediction" if axis == "adapters" else "ms, forward + backward", color=INK, fontsize=9.5)
        _decorate(axes)
    _legend(figure, handles, 6)
    figure.savefig(path, dpi=160)


def layers(cases: list[dict[str, Any]], path: Path) -> None:
    """Forward and backward in units of the frozen layer, shapes with the same contenders in one column."""
    columns: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for case in cases:
        columns.setdefault(tuple(case["results"]), []).append(case)
    bars = max(len(names) * len(group) for names, group in columns.items())
    figure = Figure(figsize=(4.8 * len(columns), 1.3 + 0.19 * bars), layout="constrained", facecolor="white")
    handles: dict[str, Any] = {}
    for axes, group in zip(figure.subplots(1, len(columns), squeeze=False).flat, columns.values(), strict=True):
        handles |= _bars(axes, group[::-1])
    handles = {name: handles[name] for name in (*BARS, "dense floor") if name in handles}
    _legend(figure, handles, 5)
    figure.savefig(path, dpi=160)


def _bars(axes: Axes, cases: list[dict[str, Any]]) -> dict[str, Any]:
    """A group of bars for each case, p10 to p90 as whiskers; the floor of a permutation as a stroke across its bar."""
    handles: dict[str, Any] = {}
    places, labels, bottom = [], [], 0.0
    for case in cases:
        names = [name for name in reversed(BARS) if name in case["results"]]
        for y, name in enumerate(names, round(bottom)):
            ratio = case["results"][name]["ratio"]["frozen"]
            whiskers = [[ratio["p50"] - ratio["p10"]], [ratio["p90"] - ratio["p50"]]]
            style: dict[str, Any] = {"color": COLOURS[name], "error_kw": {"ecolor": MUTED, "elinewidth": 0.9}}
            handles[name] = axes.barh(y, ratio["p50"], height=0.86, xerr=whiskers, **style)
            if name in PERMUTATION:
                floor = 2 * [case["floor"][PERMUTATION[name]]]
                handles["dense floor"] = axes.plot(floor, [y - 0.43, y + 0.43], color=INK)[0]
        places.append(bottom + (len(names) - 1) / 2)
        labels.append(place(case).replace(", ", "\n"))
        bottom += len(names) + 1
    axes.axvline(1, color=MUTED, linestyle=":", linewidth=1)
    axes.set_yticks(places, labels)
    axes.set_ylim(-0.8, bottom - 1.2)
    axes.set_xlabel("forward + backward, frozen layer = 1", color=INK, fontsize=9.5)
    _decorate(axes)
    axes.grid(axis="y", visible=False)
    return handles


def _legend(figure: Figure, handles: dict[str, Any], columns: int) -> None:
    place: dict[str, Any] = {"loc": "outside upper center", "ncols": columns, "frameon": False, "fontsize": 9}
    figure.legend(list(handles.values()), list(handles), **place)


def _decorate(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=8.5)
    axes.tick_params(which="minor", length=0)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
