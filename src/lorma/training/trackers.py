"""Trackers: where a run's metrics and settings go besides its directory, through transformers' own callbacks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_reporting_integration_callbacks

from lorma.errors import InputError, did_you_mean
from lorma.files import write_atomic
from lorma.runs.directory import RunDirectory

PROJECT = "lorma"
"""The project in W&B and trackio, unless ``WANDB_PROJECT`` or ``TRACKIO_PROJECT`` names another."""

Closer = Callable[[bool], object]
"""Ends a tracker's run; the argument says whether training has failed."""


class TrackedArguments(TrainingArguments):
    """Training arguments that bring the recipe into what trackers log as a run's settings, as ``recipe/train/epochs``.

    The separator is one that W&B and MLflow both allow in names.
    """

    def __init__(self, settings: dict[str, Any], **kwargs: Any) -> None:
        self.recipe = {f"recipe/{key.replace('.', '/')}": value for key, value in settings.items()}
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | self.recipe


class Trackers:
    """All trackers of ``train.report_to`` as one callback of the Trainer, which passes every event on to theirs.

    Only the main process opens them; ``run_name`` is for the training arguments. They hear of the end of training from
    :meth:`close`, because the last evaluation may come after the Trainer's end.

    Raises:
        InputError: a name that transformers does not know, or one whose package is not installed.
    """

    def __init__(self, report_to: list[str] | str | None) -> None:
        allowed = ["none", "all", *INTEGRATION_TO_CALLBACK] if isinstance(report_to, str) else INTEGRATION_TO_CALLBACK
        for name in [report_to] if isinstance(report_to, str) else report_to or []:
            if name not in allowed:
                raise InputError(
                    f"train.report_to={name!r} is unknown; allowed: {', '.join(allowed)}{did_you_mean(name, allowed)}"
                )
        kinds = get_reporting_integration_callbacks(report_to)
        self._made = {name: _make(name, kind) for name, kind in INTEGRATION_TO_CALLBACK.items() if kind in kinds}
        self._open: dict[str, Any] = {}
        self._closers: list[Closer] = []
        self._end: Callable[[Any], object] | None = None
        self.run_name: str | None = None

    def open(self, run: RunDirectory) -> None:
        """Begin a run in each tracker, or go on with that of an unfinished run where the tracker can.

        Raises:
            InputError: a tracker that does not begin, as one without its account.
        """
        if not self._made:
            return
        file = run.checkpoints / "trackers.json"
        kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"id": uuid4().hex[:8]}
        self.run_name = f"{run.path.resolve().name}-{kept['id']}"
        for name, callback in self._made.items():
            try:
                if name in _BEGIN:
                    self._closers.append(_BEGIN[name](callback, self.run_name, run, kept))
            except Exception as error:
                raise InputError(f"train.report_to={name!r} cannot be used: {_line(error)}") from error
            self._open[name] = callback
        write_atomic(file, json.dumps(kept, indent=2) + "\n")

    def __getattr__(self, event: str) -> Callable[..., None]:
        if not event.startswith("on_"):
            raise AttributeError(event)

        def pass_on(*args: Any, **kwargs: Any) -> None:
            for callback in self._open.values():
                getattr(callback, event)(*args, **kwargs)

        return pass_on

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._end = lambda callback: callback.on_train_end(*args, **kwargs)

    def close(self, failed: bool = False) -> None:
        """End the run in each tracker; a second call does nothing."""
        if self._end is not None and not failed:
            for callback in self._open.values():
                self._end(callback)
        self._open.clear()
        while self._closers:
            self._closers.pop()(failed)


def _make(name: str, kind: type) -> Any:
    try:
        return kind()
    except Exception as error:
        raise InputError(f"train.report_to={name!r} cannot be used: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _begin_tensorboard(callback: Any, run_name: str, run: RunDirectory, kept: dict[str, str]) -> Closer:
    common = os.getenv("TENSORBOARD_LOGGING_DIR")
    folder = Path(common).expanduser() / run_name if common else run.tensorboard
    callback.logging_dir = str(folder)
    # TensorBoard leaves out what an earlier file says from this step on: the steps that are trained again.
    writer = callback.tb_writer = callback._SummaryWriter(log_dir=str(folder), purge_step=run.last_step() + 1)
    return lambda failed: writer.close()


def _begin_trackio(callback: Any, run_name: str, run: RunDirectory, kept: dict[str, str]) -> Closer:
    def close(failed: bool) -> None:
        with suppress(RuntimeError):  # where it has ended
            callback._trackio.finish()

    return close  # the callback itself begins a run, or goes on with the one of the same name


def _begin_wandb(callback: Any, run_name: str, run: RunDirectory, kept: dict[str, str]) -> Closer:
    if callback._wandb.run is not None:
        return lambda failed: None  # the caller's
    project = os.getenv("WANDB_PROJECT", PROJECT)
    tracked = callback._wandb.init(project=project, name=run_name, id=kept["id"], resume="allow")
    return lambda failed: tracked.finish(exit_code=int(failed))


def _begin_mlflow(callback: Any, run_name: str, run: RunDirectory, kept: dict[str, str]) -> Closer:
    mlflow = callback._ml_flow
    if mlflow.active_run() is not None:
        return lambda failed: None  # the caller's
    tracked = mlflow.start_run(run_id=kept.get("mlflow"), run_name=run_name)
    kept["mlflow"] = tracked.info.run_id
    return lambda failed: mlflow.end_run("FAILED" if failed else "FINISHED")


_BEGIN: dict[str, Callable[[Any, str, RunDirectory, dict[str, str]], Closer]] = {
    "tensorboard": _begin_tensorboard,
    "trackio": _begin_trackio,
    "wandb": _begin_wandb,
    "mlflow": _begin_mlflow,
}
"""What begins a tracker's run so that an unfinished run of ours goes on in it; the callbacks of others do so alone."""
