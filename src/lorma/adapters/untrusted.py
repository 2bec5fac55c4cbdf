"""Reading files that came from somebody else: what they are and how large is checked before anything is taken in."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from safetensors import SafetensorError, safe_open

from lorma.errors import InputError, one_line, reading

MAX_JSON = 1 << 20
"""Bytes of a JSON file: some hundred times a usual ``adapter_config.json``."""
MAX_HEADER = 1 << 24
"""Bytes of a safetensors header: room for about 150,000 tensors."""
MAX_NAME = 256
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What tensors may hold, by its name in a safetensors header."""


@reading()
def file_within(folder: Path, name: str) -> Path:
    """The ordinary file ``name`` of a folder.

    A link may stay inside the folder, or lead from a snapshot in the hub's cache to its blobs.

    Raises:
        InputError: there is none, it is a link that leads elsewhere, no ordinary file (a pipe, a device), or may not
            be looked at.
    """
    path = folder / name
    try:
        real, home = path.resolve(strict=True), folder.resolve(strict=True)
        mode = real.stat().st_mode
    except PermissionError:
        raise
    except (OSError, RuntimeError, ValueError):
        raise InputError(f"{folder} has no {name}") from None
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(real.is_relative_to(allowed) for allowed in homes):
        raise InputError(f"{path} is a link that leads out of the folder; copy the file itself")
    if not stat.S_ISREG(mode):
        raise InputError(f"{path} is not an ordinary file")
    return path


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file of a folder.

    Raises:
        InputError: as :func:`file_within`; or it may not be read, is larger than ``MAX_JSON``, nested too deeply, no
            JSON object, or holds NaN or infinity.
    """
    return _read_json(folder, name)[1]


def copy_json(folder: Path, name: str, target: Path) -> bool:
    """Write the JSON file ``name`` of a folder, as :func:`read_json` reads it, into ``target``.

    Returns: whether the folder has such a file; nothing is written where it has none.

    Raises:
        InputError: as :func:`read_json`.
    """
    if not (folder / name).is_symlink() and not (folder / name).exists():
        return False
    (target / name).write_bytes(_read_json(folder, name)[0])
    return True


@reading()
def _read_json(folder: Path, name: str) -> tuple[bytes, dict[str, Any]]:
    path = file_within(folder, name)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_JSON + 1)
        if len(raw) > MAX_JSON:
            raise InputError(f"{path} is larger than {MAX_JSON:,} bytes")
        content = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite)
    except (InputError, PermissionError):
        raise
    except RecursionError:
        raise InputError(f"{path} cannot be read: it is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object")
    return raw, content


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is too large a number")
    return value


class TensorInfo(NamedTuple):
    """Shape and dtype of a tensor in a file, read from the header."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@reading()
def read_header(folder: Path, name: str) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes of the tensors of a safetensors file; no tensor is read.

    That names, offsets and sizes agree with the length of the file is checked by the safetensors library, so the file
    is as large as what it says it holds.

    Raises:
        InputError: as :func:`file_within`; or the file may not be read, is truncated, no safetensors file, or holds a
            tensor of a kind that is not allowed.
    """
    path = file_within(folder, name)
    refusal = f"{path} is truncated or not a safetensors file"
    try:
        with path.open("rb") as file:
            length, size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
        if size < 10 or length > min(MAX_HEADER, size - 8):
            raise InputError(f"{refusal} (its header cannot be {length:,} bytes long); copy or save it again")
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (InputError, PermissionError):
        raise
    except (SafetensorError, OSError, ValueError, TypeError, OverflowError) as error:
        raise InputError(f"{refusal} ({one_line(error)}); copy or save it again") from None
    for tensor, (shape, dtype) in found.items():
        if len(tensor) > MAX_NAME or not tensor.isprintable():
            raise InputError(f"{path} holds a tensor with a name that is too long or not printable")
        if dtype not in DTYPES or len(shape) > 8:
            raise InputError(
                f"{path}: {tensor} is of type {dtype} and shape {list(shape)[:9]}; allowed: {', '.join(DTYPES)}, at "
                "most 8 dimensions"
            )
    return {tensor: TensorInfo(shape, DTYPES[dtype]) for tensor, (shape, dtype) in found.items()}
