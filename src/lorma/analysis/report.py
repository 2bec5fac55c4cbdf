"""One self-contained HTML page, with the table and figure it shows also as files beside it."""

from __future__ import annotations

import base64
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from lorma import formatting as show
from lorma.analysis.figures import THEMES, evaluation_curve, evaluation_curves, loss_curves
from lorma.analysis.settings import complete, described
from lorma.analysis.table import Table, build_table
from lorma.files import check_directory
from lorma.runs.reading import Run, label_runs
from lorma.runs.trivial import metric_names


def write_report(runs: Sequence[Run], out_dir: str | os.PathLike[str], title: str) -> Path:
    """Write ``index.html``, ``table.md``, ``table.json`` and the figures into ``out_dir``.

    The figures are ``loss`` and, where there is a finite metric to draw, ``evaluation``, each as ``.png`` and ``.svg``
    without a background, and once more with ``-dark`` after its name for dark pages. All files are made in a temporary
    directory in ``out_dir``, or beside it if it is new, and moved in when the last one is complete, so a failure leaves
    an earlier report as it was. Other files in ``out_dir`` stay.

    Returns:
        The path of ``index.html``.

    Raises:
        InputError: as :func:`build_table` and :func:`loss_curves`, or ``out_dir`` is a file or cannot be written.
    """
    check_directory(Path(out_dir), "out_dir")
    target = Path(out_dir).resolve()
    table = build_table(runs)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target if target.is_dir() else target.parent))
    try:
        figures = _figures(runs, table, work)
        (work / "table.md").write_text(table.to_markdown(), encoding="utf-8")
        raw = json.dumps(table.to_json(), indent=2, allow_nan=False, ensure_ascii=False)
        (work / "table.json").write_text(raw + "\n", encoding="utf-8")
        (work / "index.html").write_text(_page(runs, table, figures, target, title), encoding="utf-8")
        target.mkdir(exist_ok=True)
        names = sorted((file.name for file in work.iterdir() if file.is_file()), key="index.html".__eq__)
        for name in names:  # the page last
            os.replace(work / name, target / name)
    finally:
        shutil.rmtree(work)
    return Path(out_dir) / "index.html"


def _figures(runs: Sequence[Run], table: Table, work: Path) -> list[dict[str, Any]]:
    """The figures as the page takes them: each for two widths and two brightnesses. The wide ones stay in ``work``."""
    figures = []
    for heading, caption, draw in (
        ("Training loss", _caption(table), loss_curves),
        (f"Evaluation {table.primary_metric}", _evaluation_caption(runs, table), evaluation_curves),
    ):
        files = {}
        for theme in THEMES:
            suffix = "" if theme == "light" else f"-{theme}"
            name = "loss" if draw is loss_curves else "evaluation"
            files[theme, "wide"] = draw(runs, work, f"{name}{suffix}", theme=theme)
            files[theme, "narrow"] = draw(runs, work / "narrow", f"{name}{suffix}", theme=theme, narrow=True)
        if all(files.values()):
            encoded = {
                f"{theme}_{width}": base64.b64encode(pair[1].read_bytes()).decode("ascii")
                for (theme, width), pair in files.items()
                if pair is not None
            }
            figures.append({"heading": heading, "caption": caption, **encoded})
    return figures


def _page(runs: Sequence[Run], table: Table, figures: list[dict[str, Any]], target: Path, title: str) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = files("lorma.analysis").joinpath("report.html.j2").read_text(encoding="utf-8")
    header, rows = table.cells()
    metrics = _distinct(name for run in runs for name in run.summary["final_metrics"])
    return environment.from_string(source).render(
        title=title,
        setting=_setting(runs, table),
        described=described(label_runs(runs)),
        complete=complete(label_runs(runs)),
        header=header,
        rows=rows,
        trivial_rows=len(table.trivial),
        warnings=table.warnings,
        notes=table.notes,
        figures=figures,
        metrics=[_metric_heading(runs, name) for name in metrics],
        runs=[_run_entry(run, target, metrics) for run in label_runs(runs)],
        versions=_distinct(_versions(run) for run in runs),
        devices=_devices(runs),
    )


def _setting(runs: Sequence[Run], table: Table) -> list[tuple[str, str]]:
    setting = [
        ("Model", table.model),
        ("Task", table.task),
        ("Seeds", ", ".join(str(seed) for seed in sorted({run.seed for run in runs}))),
    ]
    devices = _devices(runs)
    return [*setting, ("Device", "; ".join(devices))] if devices else setting


def _caption(table: Table) -> str:
    several = [len(row.seeds) > 1 for row in table.rows]
    if all(several):
        behind = "The band is the range over seeds."
    elif any(several):
        behind = "The band is the range over seeds; where there is one seed, the thin line is the loss as logged."
    else:
        behind = "The thin line is the loss as logged."
    mark = " The dotted line is LoRA's final loss." if table.has_baseline else ""
    return f"Training loss against optimizer step, one line per method. {behind}{mark}"


def _evaluation_caption(runs: Sequence[Run], table: Table) -> str:
    several = any(len(row.seeds) > 1 for row in table.rows)
    band = " Lines are means over seeds, bands the range." if several else ""
    once = all(len(evaluation_curve(run)) <= 1 for run in runs)
    more = " The runs were evaluated once; train.eval_steps evaluates more often." if once else ""
    mark = f" The dotted line is the {table.trivial[0].name}." if table.trivial else ""
    return f"Evaluation {table.primary_metric} against optimizer step, one line per method.{band}{mark}{more}"


def _metric_heading(runs: Sequence[Run], name: str) -> str:
    """A metric as all runs call it."""
    headings = {metric_names(run.summary)[name] for run in runs if name in run.summary["final_metrics"]}
    return headings.pop() if len(headings) == 1 else name


def _run_entry(run: Run, target: Path, metrics: list[str]) -> dict[str, Any]:
    return {
        "path": Path(os.path.relpath(run.path.resolve(), target)).as_posix(),
        "method": run.method,
        "seed": run.seed,
        "metrics": [show.metric(run.summary["final_metrics"].get(name)) for name in metrics],
    }


def _versions(run: Run) -> str:
    return ", ".join(f"{name} {version}" for name, version in (run.summary.get("versions") or {}).items())


def _devices(runs: Sequence[Run]) -> list[str]:
    return _distinct(run.summary.get("device") for run in runs)


def _distinct(values: Any) -> list[str]:
    return list(dict.fromkeys(str(value) for value in values if value))
