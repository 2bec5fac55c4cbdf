"""A run directory on disk: what it holds, when it may be written, and where a killed run goes on.

``recipe.yaml`` is there from the first moment, ``metrics.jsonl`` grows while training, ``checkpoints/`` holds the last
two checkpoints, ``adapter/`` (``model/`` for full fine-tuning) and ``summary.json`` come last. A checkpoint counts
only once its marker file is there, which is written after everything else; files and folders appear under their final
name by a rename. So a kill, a full disk or Ctrl-C at any moment leaves a directory that can be resumed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from pathlib import Path
from typing import IO, Any

from lorma.errors import InputError
from lorma.files import check_directory, write_atomic
from lorma.runs.recipe import Recipe, differences, parse_recipe
from lorma.yaml_text import load_yaml

MARKER = "complete"
KEPT_CHECKPOINTS = 2
LOOK_SECONDS = 0.5
"""How long a lock must last to be that of a process that trains."""


class RunDirectory:
    """The directory ``recipe.output``."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe_file = self.path / "recipe.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.summary_file = self.path / "summary.json"
        self.checkpoints = self.path / "checkpoints"
        self.data_file = self.checkpoints / "data.json"
        self.adapter = self.path / "adapter"
        self.model = self.path / "model"
        self.tensorboard = self.path / "tensorboard"
        self.lock_file = self.path / ".lock"
        self._lock: IO[str] | None = None

    @property
    def finished(self) -> bool:
        """Whether the run ended well: its summary is the last file to be written."""
        return self.summary_file.is_file()

    @property
    def in_use(self) -> bool:
        """Whether a process is training here."""
        try:
            with self.lock_file.open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def read_recipe(self) -> Recipe:
        """The recipe this run was started with.

        Raises:
            InputError: no recipe, or one that this version does not accept.
        """
        if not self.recipe_file.is_file():
            raise InputError(f"{self.path} is not a run directory: it has no recipe.yaml")
        try:
            content = load_yaml(self.recipe_file.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise InputError("it must hold keys and values")
            return parse_recipe(content)
        except (UnicodeDecodeError, InputError) as error:
            raise InputError(f"{self.recipe_file} was not written by this version of lorma: {error}") from None

    def check(self, recipe: Recipe, overwrite: bool) -> None:
        """Refuse to train ``recipe`` here if that would destroy or mix anything; ``overwrite`` allows it for a run.

        Raises:
            InputError: a finished run, an unfinished run of another recipe, a directory that is no run, or one in which
                nothing can be written.
        """
        check_directory(self.path)
        if not self.path.is_dir() or all(_is_ours(entry) for entry in self.path.iterdir()):
            return
        if not self.recipe_file.is_file():
            raise InputError(f"output={str(self.path)!r} holds other files and no run; name a new directory")
        if overwrite:
            return
        if self.finished:
            raise InputError(f"output={str(self.path)!r} holds a finished run; give --overwrite to train it anew")
        changed = differences(self.read_recipe(), recipe)
        if changed:
            raise InputError(
                f"output={str(self.path)!r} holds an unfinished run with another {', '.join(changed)}; "
                "give --overwrite to start anew, or another output"
            )

    def changed_data(self, data: dict[str, str]) -> list[str]:
        """Keys of the sources that are not what they were when this run began; ``data`` holds their fingerprints.

        What is known of one of the two only, as of a run of an earlier version, does not count.
        """
        began = self._began_with()
        return [key for key, fingerprint in data.items() if began.get(key, fingerprint) != fingerprint]

    def check_data(self, data: dict[str, str], overwrite: bool) -> None:
        """As :meth:`check`, for the content of the data.

        Raises:
            InputError: a run that began with other data.
        """
        changed = [] if overwrite else self.changed_data(data)
        if changed:
            raise InputError(
                f"output={str(self.path)!r}: {' and '.join(changed)} has changed since this run began; "
                "give --overwrite to start anew, or another output"
            )

    def open(self, recipe: Recipe, overwrite: bool, data: dict[str, str]) -> None:
        """Make the directory ready to train ``recipe`` from the start or from its last checkpoint.

        ``overwrite`` clears a finished run and a run of another recipe or other data; an unfinished run of this recipe
        goes on, so that an interrupted ``--overwrite`` does. What is cleared goes in an order that leaves either a
        finished run or an unfinished one without checkpoints at any moment.

        Raises:
            InputError: another process is training here, or has since :meth:`check` left what that refuses.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        try:
            self.check(recipe, overwrite)  # again: another process may have trained here since, and ended
            self.check_data(data, overwrite)
            self._make_ready(recipe, overwrite, data)
        except BaseException:
            self.close()
            raise

    def _make_ready(self, recipe: Recipe, overwrite: bool, data: dict[str, str]) -> None:
        goes_on = not self.finished and self._holds(recipe) and not self.changed_data(data)
        if overwrite and self.recipe_file.is_file() and not goes_on:
            if self.checkpoints.is_dir():
                os.replace(self.checkpoints, self.path / f".checkpoints.{os.getpid()}.tmp")
            for path in (self.summary_file, self.metrics_file):
                path.unlink(missing_ok=True)
            for folder in (self.adapter, self.model, self.tensorboard):
                shutil.rmtree(folder, ignore_errors=True)
        self.checkpoints.mkdir(exist_ok=True)
        write_atomic(self.data_file, json.dumps(self._began_with() | data, indent=2) + "\n")
        write_atomic(self.recipe_file, recipe.to_yaml())
        for left_over in (*self.path.glob(".*.tmp"), *self.checkpoints.glob(".*.tmp")):
            shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
        for folder in self.checkpoints.glob("checkpoint-*"):
            if not (folder / MARKER).is_file():
                shutil.rmtree(folder)
        self._trim_metrics(self.last_step())

    def close(self) -> None:
        """Let other processes train here."""
        if self._lock is not None:
            self.lock_file.unlink(missing_ok=True)  # while it is still locked: see _take_lock
            self._lock.close()
            self._lock = None

    def _began_with(self) -> dict[str, str]:
        if not self.recipe_file.is_file() or not self.data_file.is_file():
            return {}
        known: dict[str, str] = json.loads(self.data_file.read_text(encoding="utf-8"))
        return known

    def _holds(self, recipe: Recipe) -> bool:
        try:
            return not differences(self.read_recipe(), recipe)
        except InputError:
            return False

    def _take_lock(self) -> None:
        """Lock ``.lock``, and make sure that it is the file of that name: who held it removes it, and a lock on the
        removed file keeps nobody out. A lock that is gone in a moment is only :attr:`in_use` looking.
        """
        patience = time.monotonic() + LOOK_SECONDS
        while self._lock is None:
            lock = self.lock_file.open("w")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock.close()
                if time.monotonic() < patience:
                    time.sleep(LOOK_SECONDS / 20)
                    continue
                raise InputError(f"output={str(self.path)!r} is being trained by another process") from None
            try:
                current = os.path.samestat(os.fstat(lock.fileno()), self.lock_file.stat())
            except FileNotFoundError:
                current = False
            if current:
                self._lock = lock
            else:
                lock.close()

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint."""
        complete = [folder for folder in self.checkpoints.glob("checkpoint-*") if (folder / MARKER).is_file()]
        return max(complete, key=_step_of, default=None)

    def last_step(self) -> int:
        """The optimizer step of the newest complete checkpoint, or 0."""
        folder = self.last_checkpoint()
        return _step_of(folder) if folder else 0

    def mark_complete(self, step: int) -> None:
        """Make the checkpoint of ``step`` count."""
        write_atomic(self.checkpoints / f"checkpoint-{step}" / MARKER, "")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``; one that a kill cut in half is left out."""
        entries = []
        if self.metrics_file.is_file():
            for line in self.metrics_file.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    entries.append(json.loads(line))
                except json.JSONDecodeError:
                    break
        return entries

    def _trim_metrics(self, last_step: int) -> None:
        if not self.metrics_file.exists():
            return
        kept = [json.dumps(entry) + "\n" for entry in self.metrics() if entry["step"] <= last_step]
        write_atomic(self.metrics_file, "".join(kept))


def _is_ours(entry: Path) -> bool:
    """What a run leaves when it ends before its recipe is written."""
    return entry.name in ("checkpoints", ".lock") or (entry.name.startswith(".") and entry.name.endswith(".tmp"))


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
