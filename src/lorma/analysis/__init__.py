"""Finished runs in; numbers, tables, figures and one HTML report out. Never trains, never downloads."""

from lorma.analysis.figures import evaluation_curves, loss_curves
from lorma.analysis.report import write_report
from lorma.analysis.table import Row, Table, build_table
from lorma.runs.convergence import (
    auc_change,
    default_window,
    final_loss,
    has_fallen,
    loss_auc,
    smooth,
    steps_to_reach,
)
from lorma.runs.reading import Evaluation, Run, load_run

__all__ = [
    "Evaluation",
    "Row",
    "Run",
    "Table",
    "auc_change",
    "build_table",
    "default_window",
    "evaluation_curves",
    "final_loss",
    "has_fallen",
    "load_run",
    "loss_auc",
    "loss_curves",
    "smooth",
    "steps_to_reach",
    "write_report",
]
