"""Has the data changed? Hashes of the sources that a recipe names, to compare with those of another day."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from lorma.schema import DataSpec
from lorma.tasks.table import kind_of_source, quiet

CHUNK = 1 << 20


def fingerprints(spec: DataSpec) -> dict[str, str]:
    """A SHA-256 for ``data.train`` and one for ``data.eval``, as far as ``spec`` names them.

    That of a file is of its bytes. That of a directory or hub data set is of the data files which
    :mod:`datasets` finds there: their names with, on this machine, their bytes; on the hub the address names the
    commit. What is packaged never changes and has none, nor has what cannot be read: loading it says why.
    """
    found = {}
    for field in ("train", "eval"):
        name = getattr(spec, field)
        try:
            digest = None if name is None else _of_source(name, spec.config)
        except OSError:
            continue
        if digest is not None:
            found[f"data.{field}"] = digest
    return found


def _of_source(name: str, config: str | None) -> str | None:
    kind, path = kind_of_source(name), Path(name).expanduser()
    if kind == "file":
        return _of_file(path)
    if kind == "directory":
        lines = [f"{os.path.relpath(file, path)} {_of_file(Path(file))}" for file in _published(str(path), config)]
    elif kind == "hub":
        lines = _published(name, config)
    else:
        return None
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest() if lines else None


def _of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _published(name: str, config: str | None) -> list[str]:
    """The data files of a directory or hub data set."""
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetsError

    try:
        with quiet():
            splits = load_dataset_builder(name, config).config.data_files or {}
    except (ValueError, RuntimeError, DatasetsError):
        return []
    return [file for files in splits.values() for file in files]
