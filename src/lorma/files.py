"""Where output may go, files and folders that appear whole or not at all, the name of the file beside every adapter."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from lorma.errors import InputError

META_FILE = "lorma_task.json"
"""Lies beside trained weights and says which model and which kind of data they belong to."""


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that is written, and so may be replaced.

    Attributes:
        name: in words, with its article.
        files: names of all that such a folder may hold, with ``*`` and ``?``; ``folder/name`` lies in a folder in it.
    """

    name: str
    files: Collection[str]


def check_output(output: Path, overwrite: bool, *inputs: str | Path, kind: FolderKind | None) -> None:
    """Refuse a place for a new file or folder before any work is done.

    An existing folder may be replaced if it holds nothing but what such folders hold, and is neither the current
    directory nor the home directory nor above one of them. A device or a pipe may always be written.

    Args:
        overwrite: whether what is there may be replaced.
        inputs: folders and files that are read; the output may not be one of them, or hold one.
        kind: of folder that is written; None for a file.

    Raises:
        InputError: naming the output and the reason.
    """
    named, place = f"output={str(output)!r}", _real(output)
    if kind is None and _is_special(output):
        if not os.access(output, os.W_OK):
            raise InputError(f"{named} cannot be written")
        return
    _check_writable(place.parent, f"{named}: its directory", made=False)
    if not os.path.exists(place):
        return
    if place.is_dir() == (kind is None):
        raise InputError(f"{named} is a {'folder; name a file' if kind is None else 'file; name a folder'}")
    for path in inputs:
        if _holds(place, path):
            verb = "is" if os.path.samefile(place, path) else "holds"
            raise InputError(f"{named} {verb} {str(path)!r}, which is read; choose another output")
    if kind is not None:
        for path, called in ((".", "current"), ("~", "home")):
            if _holds(place, os.path.expanduser(path)):
                raise InputError(f"{named} is the {called} directory, or holds it; name a new directory")
        if not os.access(place, os.R_OK | os.W_OK | os.X_OK):
            raise InputError(f"{named} cannot be written")
        foreign = _foreign(place, kind.files)
        if foreign is not None:
            raise InputError(
                f"{named} holds other files than those of {kind.name} ({str(foreign.relative_to(place))!r}); name a "
                "new directory"
            )
    if not overwrite:
        raise InputError(f"{named} exists; give --overwrite to replace it")


def check_directory(path: str | Path, key: str = "output") -> None:
    """Refuse a directory to write into before any work is done; one that is not there will be made.

    Args:
        key: what the path is called in errors.

    Raises:
        InputError: it, or what is nearest above it, is a file or may not be written.
    """
    if os.path.exists(path) and not os.path.isdir(path):
        raise InputError(f"{key}={str(path)!r} is a file; name a directory")
    named = f"{key}={str(path)!r}"
    _check_writable(_real(path), named if os.path.isdir(path) else f"{named}: its directory", made=True)


def _check_writable(directory: Path, named: str, made: bool) -> None:
    """Refuse a directory that cannot be written, or made where ``made`` says that it will be."""
    nearest = next(place for place in (directory, *directory.parents) if os.path.lexists(place))
    if not os.path.isdir(nearest):
        raise InputError(f"{named} cannot be written: {str(nearest)!r} is a file")
    if nearest != directory and not made and os.access(nearest, os.X_OK):
        raise InputError(f"{named} does not exist")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{named} cannot be written")


def _real(path: str | Path) -> Path:
    return Path(os.path.realpath(path))


def _is_special(path: Path) -> bool:
    """Whether something is there that is neither a file nor a folder: a device, a pipe."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def _holds(place: Path, path: str | Path) -> bool:
    """Whether ``place``, which exists, is ``path`` or above it, however the two are spelled."""
    path = _real(path)
    return any(os.path.exists(above) and os.path.samefile(place, above) for above in (path, *path.parents))


def _foreign(folder: Path, names: Collection[str]) -> Path | None:
    """The first entry of a folder that is none of ``names``; a link never is."""
    for entry in sorted(folder.iterdir()):
        within = [name.partition("/")[2] for name in names if name.startswith(f"{entry.name}/")]
        if within and entry.is_dir() and not entry.is_symlink():
            found = _foreign(entry, within)
        else:
            known = stat.S_ISREG(entry.lstat().st_mode) and any(fnmatchcase(entry.name, name) for name in names)
            found = None if known else entry
        if found is not None:
            return found
    return None


def write_atomic(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it: readers see the old file or the whole new one."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_file(path: Path, fill: Callable[[Path], object]) -> None:
    """Let ``fill`` write a file under a temporary name, then put it in the place of ``path``.

    A link is followed. What is there and no file (a device, a pipe) is written as it is, not replaced.
    """
    if _is_special(path):
        fill(path)
        return
    path = _real(path)
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
