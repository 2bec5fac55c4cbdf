"""Which step of a run is the best, and when a run has stopped improving.

Both are functions of the evaluations in ``metrics.jsonl``. That file is cut back to the last complete checkpoint when
a run goes on, so a killed run counts its patience, and finds its best step, as an undisturbed one does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorma.runs.directory import RunDirectory
from lorma.tasks import Task

if TYPE_CHECKING:
    from lorma.schema import TrainSpec

Evaluation = tuple[int, float]
"""An optimizer step and the value of the metric there; NaN where it is not defined."""


def best_step(evaluations: Sequence[Evaluation], greater_is_better: bool) -> int | None:
    """The step with the best value, the earliest of equals; None where no value is a number."""
    sign = 1 if greater_is_better else -1
    defined = [(sign * value, -step) for step, value in evaluations if not math.isnan(value)]
    return -max(defined)[1] if defined else None


def since_improvement(evaluations: Sequence[Evaluation], greater_is_better: bool, least: float) -> int:
    """How many evaluations have passed since the last improvement.

    An improvement is a value better by more than ``least``, in units of the metric, than that of the improvement
    before it; the first number is one. A value that is not a number never is.
    """
    sign = 1 if greater_is_better else -1
    reference, passed = -math.inf, 0
    for _, value in evaluations:
        if sign * value > reference + least:
            reference, passed = sign * value, 0
        else:
            passed += 1
    return passed


def chosen_metric(spec: TrainSpec, task: Task) -> str:
    """The metric that decides which step is the best: that of early stopping, or the task's primary one."""
    stopping = spec.early_stopping
    return (stopping.metric if stopping else None) or task.primary_metric


class Selection(TrainerCallback):
    """Ends a run that no longer improves, and has a checkpoint made at each step that is the best so far.

    ``checkpoint`` is the best step's one, once it is complete. It is not removed before the next best one is.
    """

    def __init__(self, run: RunDirectory, spec: TrainSpec, task: Task) -> None:
        self.run, self.stopping, self.keeps_best = run, spec.early_stopping, spec.keep == "best"
        self.metric = chosen_metric(spec, task)
        self.greater_is_better = task.metrics[self.metric]
        self.evaluations = [
            (entry["step"], _number(entry[f"eval_{self.metric}"]))
            for entry in run.metrics()
            if f"eval_{self.metric}" in entry
        ]
        self.saved = run.last_step()

    @property
    def best_step(self) -> int | None:
        """The best step so far."""
        return best_step(self.evaluations, self.greater_is_better)

    @property
    def steps(self) -> list[int]:
        """The steps that were evaluated."""
        return [step for step, _ in self.evaluations]

    @property
    def reason(self) -> str:
        """Why the run has stopped, in words."""
        count = 0 if self.stopping is None else self.stopping.patience
        return f"no better {self.metric} for {count} evaluation{'s' if count > 1 else ''}"

    @property
    def has_stopped(self) -> bool:
        """Whether patience has run out."""
        if self.stopping is None:
            return False
        passed = since_improvement(self.evaluations, self.greater_is_better, self.stopping.min_improvement)
        return passed >= self.stopping.patience

    def checkpoint(self) -> Path | None:
        """The checkpoint of the best step."""
        return None if self.best_step is None else self.run.checkpoints / f"checkpoint-{self.best_step}"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_training_stop = self.has_stopped
        self._protect(state)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        step = state.global_step
        self.evaluations.append((step, _number(kwargs["metrics"][f"eval_{self.metric}"])))
        control.should_training_stop |= self.has_stopped
        if self.has_stopped or (self.keeps_best and self.best_step == step):
            control.should_save = step != self.saved

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A run that stops inside an epoch ends the epoch too, and what is complete must not be written again.
        control.should_save &= state.global_step != self.saved

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.saved = state.global_step
        self._protect(state)

    def _protect(self, state: TrainerState) -> None:
        """Keep the Trainer from removing the best checkpoint."""
        checkpoint = self.checkpoint() if self.keeps_best else None
        state.best_model_checkpoint = str(checkpoint) if checkpoint and checkpoint.is_dir() else None


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
