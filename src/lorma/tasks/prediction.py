"""Rows to predict: from a file or a text on the command line, in the shape that a trained task's ``meta`` asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorma.errors import InputError
from lorma.tasks.base import Meta
from lorma.tasks.chat import check_messages
from lorma.tasks.files import EXTENSIONS, check_exists, extension, read_file, read_text
from lorma.tasks.table import all_rows

INPUT_FIELDS = ("text", "text_pair", "prompt", "messages")


def input_columns(meta: Meta) -> dict[str, str]:
    """The columns a row to predict must have: field of the recipe's ``data`` section → column name."""
    return {field: meta[field] for field in INPUT_FIELDS if meta.get(field)}


def text_row(meta: Meta, text: str, text_pair: str | None = None) -> dict[str, Any]:
    """A row made of a bare text (for a chat: one message of the user) and, for pairs, its second text.

    Raises:
        InputError: a pair is needed and missing, or given and not needed.
    """
    if (meta.get("text_pair") is None) != (text_pair is None):
        needed = "two texts, one is given" if text_pair is None else "one text, two are given"
        raise InputError(f"text_pair: the task {meta['task']!r} of this adapter takes {needed}")
    if meta["format"] == "messages":
        return {meta["messages"]: [{"role": "user", "content": text}]}
    row: dict[str, Any] = {meta.get("prompt") or meta["text"]: text}
    if text_pair is not None:
        row[meta["text_pair"]] = text_pair
    return row


def read_prediction_rows(path: Path | str, meta: Meta, key: str = "--file") -> list[dict[str, Any]]:
    """The rows of a prediction file, in order, with all their columns.

    A .txt file holds one text a line; the other formats are those of training data (a CSV or TSV file needs a header
    row) and must have the columns that training used as input; labels and completions are not needed.

    Args:
        path: a .txt, .csv, .tsv, .json, .jsonl or .parquet file; ``.gz`` may follow the text formats.
        meta: of the trained task, see :class:`lorma.tasks.base.Prepared`.
        key: what to call the file in errors.

    Raises:
        InputError: a file that cannot be read, a missing column, or a row with an empty input.
    """
    path = Path(path).expanduser()
    check_exists(path, key)
    if extension(path) == ".txt":
        return _text_lines(path, meta, f"{key} '{path}'")
    if extension(path) not in EXTENSIONS:
        raise InputError(f"{key}: '{path}' has no known extension; allowed: .txt, {', '.join(EXTENSIONS)}")
    rows = all_rows(read_file(path, key), key)
    for field, column in input_columns(meta).items():
        if field == "messages":
            for number, value in zip(rows.numbers, rows.column(field, column), strict=True):
                check_messages(value, f"data.messages: column {column!r} of {key} row {number}")
        else:
            rows.text(field, column)
    found: list[dict[str, Any]] = rows.data.to_list()
    return found


def _text_lines(path: Path, meta: Meta, where: str) -> list[dict[str, Any]]:
    if meta.get("text_pair"):
        raise InputError(f"{where}: this adapter reads pairs of texts; allowed: {', '.join(EXTENSIONS)}")
    lines = [line.removesuffix("\r") for line in read_text(path, where).split("\n")]
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise InputError(f"{where} is empty")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise InputError(f"{where} line {number} is empty; every line must hold a text")
    return [text_row(meta, line) for line in lines]
