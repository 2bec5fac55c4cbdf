"""Finished runs in; numbers, tables, figures and one HTML report out. Never trains, never downloads."""

from lorma.analysis.convergence import (
    auc_change,
    default_window,
    final_loss,
    has_fallen,
    loss_auc,
    smooth,
    steps_to_reach,
)
from lorma.analysis.figures import evaluation_curves, loss_curves
from lorma.analysis.report import write_report
from lorma.analysis.runs import Evaluation, Run, load_run
from lorma.analysis.table import Row, Table, build_table

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
