"""What happens while transformers' Trainer runs: metrics on disk, progress on the terminal, checkpoints that count."""

from __future__ import annotations

import json
import math
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorma.files import share
from lorma.runs.directory import RunDirectory

NOT_METRICS = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time")


def evaluation_metrics(logs: dict[str, float] | None) -> dict[str, float]:
    """The evaluation metrics among what the Trainer logs, with their ``eval_`` prefix, without its timings."""
    return {key: value for key, value in (logs or {}).items() if key.startswith("eval_") and key not in NOT_METRICS}


class DivergedError(RuntimeError):
    """The training loss is no longer a number."""


class RunRecorder(TrainerCallback):
    """Writes ``metrics.jsonl`` as training goes and marks checkpoints that are whole.

    Every line carries ``step`` and ``seconds`` (spent training so far, also before the run was resumed).
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        earlier = run.metrics()
        self.seconds_before = max((entry["seconds"] for entry in earlier), default=0.0)
        self.tokens, self.time = 0, 0.0

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        return self.seconds_before + time.perf_counter() - self.started

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started = self.time = time.perf_counter()
        self.tokens = int(state.num_input_tokens_seen)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        # The Trainer keeps every line for its own state file; ours are on disk already.
        state.log_history.clear()
        logs, metrics = logs or {}, evaluation_metrics(logs)
        if "loss" in logs:
            now, tokens = time.perf_counter(), int(state.num_input_tokens_seen)
            metrics |= {key: logs[key] for key in ("loss", "learning_rate", "grad_norm") if key in logs}
            metrics["tokens_per_second"] = (tokens - self.tokens) / (now - self.time)
            self.tokens, self.time = tokens, now
        if not metrics:
            return
        if state.is_world_process_zero:
            entry = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 6), "seconds": self.seconds}
            with self.run.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry | {k: v if math.isfinite(v) else None for k, v in metrics.items()}) + "\n")
        if not math.isfinite(metrics.get("loss", 0.0)):
            raise DivergedError(
                f"the training loss is {metrics['loss']} at step {state.global_step}; try a lower train.learning_rate"
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            share(self.run.checkpoints / f"checkpoint-{state.global_step}")
            self.run.mark_complete(state.global_step)


class ProgressBar(TrainerCallback):
    """A bar with the loss and the time left; plain lines, ten in a run, where the output is no terminal."""

    def __init__(self, console: Console, title: str) -> None:
        self.console = console
        self.title = title
        self.loss = math.nan

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (self.console.is_terminal and state.is_world_process_zero),
        )
        self.task = self.bar.add_task(self.title, total=state.max_steps, completed=state.global_step, loss=self.loss)
        self.first_step, self.started = state.global_step, time.perf_counter()
        self.bar.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero:
            return
        logs = logs or {}
        self.loss = logs.get("loss", self.loss)
        self.bar.update(self.task, completed=state.global_step, loss=self.loss)
        shown = [
            f"{key.removeprefix('eval_')} {value:.4f}"
            for key, value in evaluation_metrics(logs).items()
            if key != "eval_predicted_classes"
        ]
        if shown:
            self.console.print(f"  step {state.global_step}: evaluation {', '.join(shown)}")
        elif "loss" in logs and not self.console.is_terminal and state.global_step % max(1, state.max_steps // 10) == 0:
            pace = (time.perf_counter() - self.started) / max(1, state.global_step - self.first_step)
            left = pace * (state.max_steps - state.global_step)
            self.console.print(f"  step {state.global_step}/{state.max_steps}: loss {self.loss:.4f}, ETA {left:.0f} s")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back; also after a failure."""
        if hasattr(self, "bar"):
            self.bar.stop()
