"""Task families: from the ``data`` section of a recipe to what the Trainer needs, and back from outputs to answers.

Importing this package is quick; torch, transformers and datasets are imported when a task is first used.
"""

from __future__ import annotations

from lorma.errors import InputError, did_you_mean
from lorma.schema import DataSpec
from lorma.tasks.base import Prepared, Task
from lorma.tasks.causal_lm import CausalLM
from lorma.tasks.classification import Classification
from lorma.tasks.prediction import answer_line, input_columns, kept_columns, read_prediction_rows, text_row
from lorma.tasks.regression import Regression
from lorma.tasks.table import Rows, Splits, load_splits

__all__ = [
    "TASKS",
    "CausalLM",
    "Classification",
    "DataSpec",
    "Prepared",
    "Regression",
    "Rows",
    "Splits",
    "Task",
    "answer_line",
    "get_task",
    "input_columns",
    "kept_columns",
    "load_splits",
    "read_prediction_rows",
    "text_row",
]

TASKS: dict[str, type[Task]] = {task.name: task for task in (Classification, Regression, CausalLM)}


def get_task(name: str) -> Task:
    """The task called ``name``.

    Raises:
        InputError: no such task; the message lists :data:`TASKS` and the nearest name.
    """
    if name not in TASKS:
        raise InputError(f"task: {name!r} is unknown; allowed: {', '.join(TASKS)}{did_you_mean(name, TASKS)}")
    return TASKS[name]()
