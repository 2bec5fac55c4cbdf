"""Files and folders that appear whole or not at all, and the name of the file beside every adapter."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

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
    """Let ``fill`` write a folder under a temporary name, then put it in the place of ``path``."""
    path = path.absolute()
    temporary, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    for left in (temporary, old):
        shutil.rmtree(left, ignore_errors=True)
    try:
        fill(temporary)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
    finally:
        for left in (temporary, old):
            shutil.rmtree(left, ignore_errors=True)
