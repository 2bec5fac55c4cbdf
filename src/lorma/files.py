"""Files and folders that appear whole or not at all, and the name of the file beside every adapter."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from lorma.errors import InputError

META_FILE = "lorma_task.json"
"""Lies beside trained weights and says which model and which kind of data they belong to."""


def write_atomic(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it: readers see the old file or the whole new one."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_file(path: Path, fill: Callable[[Path], object]) -> None:
    """Let ``fill`` write a file under a temporary name, then put it in the place of ``path``."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        fill(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Let ``fill`` make a folder under a temporary name, then put it in the place of ``path``.

    Both the new folder and the replaced one lie in a hidden folder of this run's own, which a kill leaves behind. A
    link to a folder is followed, as what it leads to is replaced. Files get the permissions of any new file.

    Raises:
        InputError: the directory that the folder is to lie in cannot be written.
    """
    path = path.resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be written: {error.strerror}") from None
    temporary, old = place / "new", place / "old"
    try:
        fill(temporary)
        share(temporary)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(place, ignore_errors=True)


def share(folder: Path) -> None:
    """Give all files in a folder the permissions that a new file gets there; safetensors keeps its own to the owner."""
    probe = folder / f".{os.getpid()}.tmp"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for file in folder.rglob("*"):
        found = file.lstat().st_mode
        if stat.S_ISREG(found) and found != mode:
            file.chmod(stat.S_IMODE(mode))
