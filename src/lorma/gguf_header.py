"""Single values at the head of a GGUF file, without its vocabulary, which takes transformers many seconds to read."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

STRING, ARRAY = 8, 9
FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
"""Types of values that have a fixed size."""
MAX_TEXT = 1 << 20
"""Bytes of one text that are read."""
MAX_ITEMS = 1 << 12
"""Texts in a list that are passed over; longer lists are vocabularies."""


def gguf_values(path: Path, names: Iterable[str]) -> dict[str, Any]:
    """Those of ``names`` that lie before the vocabulary; ``*.context_length`` finds ``llama.context_length``.

    A file that ends early, or is no GGUF file, gives what was found until then.

    Raises:
        OSError: the file cannot be read.
    """
    wanted = set(names)
    found: dict[str, Any] = {}
    with path.open("rb") as file:
        try:
            file.seek(16)  # magic number, version, number of tensors
            for _ in range(_number(file, "<Q")):
                key, kind = file.read(min(_number(file, "<Q"), MAX_TEXT)).decode(errors="replace"), _number(file, "<I")
                if key.startswith("tokenizer.") or (kind == ARRAY and not _pass_list(file)):
                    break
                if kind != ARRAY:
                    value = _value(file, kind)
                    for name in {key, f"*.{key.rpartition('.')[2]}"} & wanted:
                        found.setdefault(name, value)
        except (struct.error, KeyError):
            pass
    return found


def _number(file: BinaryIO, form: str) -> Any:
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return file.read(min(_number(file, "<Q"), MAX_TEXT)).decode(errors="replace")
    return _number(file, FORMATS[kind])


def _pass_list(file: BinaryIO) -> bool:
    """Go to the end of a list; False where it is too long to be passed over."""
    kind, length = _number(file, "<I"), _number(file, "<Q")
    if kind in FORMATS:
        file.seek(length * struct.calcsize(FORMATS[kind]), io.SEEK_CUR)
        return True
    if kind != STRING or length > MAX_ITEMS:
        return False
    for _ in range(length):
        _value(file, kind)
    return True
