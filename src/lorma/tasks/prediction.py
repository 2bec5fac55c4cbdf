"""Rows to predict: from a file or a text on the command line, in the shape that a trained task's ``meta`` asks for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from datetime import date, time
from pathlib import Path
from typing import Any

from lorma.errors import InputError, did_you_mean
from lorma.labels import listed
from lorma.schema import check_delimiter, check_encoding
from lorma.tasks.base import Meta
from lorma.tasks.chat import check_messages
from lorma.tasks.files import (
    EXTENSIONS,
    check_exists,
    extension,
    half_character,
    read_file,
    read_rows,
    read_text,
)
from lorma.tasks.table import all_rows

INPUT_FIELDS = ("text", "text_pair", "prompt", "messages")
ANSWER_COLUMNS = {
    "label": "predicted_label",
    "score": "score",
    "value": "predicted_value",
    "completion": "predicted_completion",
}
"""What an answer's parts are called in a file, beside the columns of the input and their true labels."""
_ANSWERS = {"classification": ("label", "score"), "regression": ("value",), "causal-lm": ("completion",)}


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
    for given in (text, text_pair):
        if half := half_character(given):
            raise InputError(f"--text: {half} is no Unicode character (half of one, or bytes that are not UTF-8)")
    if meta["format"] == "messages":
        return {meta["messages"]: [{"role": "user", "content": text}]}
    row: dict[str, Any] = {meta.get("prompt") or meta["text"]: text}
    if text_pair is not None:
        row[meta["text_pair"]] = text_pair
    return row


def read_prediction_rows(
    path: Path | str, meta: Meta, key: str = "--file", delimiter: str | None = None, encoding: str | None = None
) -> list[dict[str, Any]]:
    """The rows of a prediction file, in order, with all their columns.

    A .txt file holds one text a line; the other formats are those of training data (a CSV or TSV file needs a header
    row) and must have the columns that training used as input; labels and completions are not needed.

    Args:
        path: a .txt, .csv, .tsv, .json, .jsonl or .parquet file; ``.gz`` may follow the text formats.
        meta: of the trained task, see :class:`lorma.tasks.base.Prepared`.
        key: what to call the file in errors.
        delimiter, encoding: as for :func:`lorma.tasks.files.read_file`.

    Raises:
        InputError: a file that cannot be read, a missing column, or a row with an empty input.
    """
    path = Path(path).expanduser()
    delimiter = _checked("delimiter", delimiter, check_delimiter)
    encoding = _checked("encoding", encoding, check_encoding)
    check_exists(path, key)
    if extension(path) == ".txt":
        if delimiter is not None:
            raise InputError(f"--delimiter: only CSV and TSV files have one, but {key} is '{path}'")
        return _text_lines(path, meta, f"{key} '{path}'", encoding)
    if extension(path) not in EXTENSIONS:
        raise InputError(f"{key}: '{path}' has no known extension; allowed: .txt, {', '.join(EXTENSIONS)}")
    rows = all_rows(read_file(path, key, delimiter=delimiter, encoding=encoding), key)
    for field, column in input_columns(meta).items():
        if field == "messages":
            for number, value in zip(rows.numbers, rows.column(field, column), strict=True):
                check_messages(value, f"data.messages: column {column!r} of {key} row {number}")
        else:
            rows.text(field, column)
    return read_rows(path, key, delimiter, encoding)


def _checked(option: str, value: str | None, check: Callable[[str], str]) -> str | None:
    try:
        return None if value is None else check(value)
    except ValueError as error:
        raise InputError(f"--{option}={value!r}: {error}") from None


def kept_columns(
    rows: Sequence[dict[str, Any]], meta: Meta, columns: Sequence[str] | None = None, written: bool = True
) -> list[str]:
    """The columns of the input that are given beside the answers, in their order.

    Args:
        rows: of the input.
        meta: of the trained task.
        columns: what the user chose; None for all of them in a file, and those that the task reads on a terminal.
        written: to a file, where every column needs a name of its own.

    Raises:
        InputError: no such column, or one that is called like an answer, see :data:`ANSWER_COLUMNS`.
    """
    there = list(dict.fromkeys(name for row in rows for name in row))
    for name in columns or []:
        if name not in there:
            raise InputError(
                f"--columns: the input has no column {name!r}; its columns are {listed(there)}"
                f"{did_you_mean(name, there)}"
            )
    if columns is None:
        columns = there if written else list(input_columns(meta).values())
    kept = list(dict.fromkeys(columns))
    if not written:
        return kept
    answers = [ANSWER_COLUMNS[part] for part in _ANSWERS[meta["task"]]]
    for name in kept:
        if name in answers:
            raise InputError(
                f"the input has a column {name!r}, which is what an answer is called; rename it, or name the columns "
                "to keep with --columns"
            )
    return kept


def answer_line(row: dict[str, Any], answer: dict[str, Any], kept: Sequence[str]) -> str:
    """One JSON object: the ``kept`` columns of a row, and its answer under the names of :data:`ANSWER_COLUMNS`.

    What JSON has no form for is text (times in ISO form), and a number that is not finite is null.
    """
    named = {ANSWER_COLUMNS[part]: value for part, value in answer.items()}
    return json.dumps(_plain({**{name: row.get(name) for name in kept}, **named}), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return value if value is None or isinstance(value, str | int) else str(value)


def _text_lines(path: Path, meta: Meta, where: str, encoding: str | None) -> list[dict[str, Any]]:
    if meta.get("text_pair"):
        raise InputError(f"{where}: this adapter reads pairs of texts; allowed: {', '.join(EXTENSIONS)}")
    lines = [line.removesuffix("\r") for line in read_text(path, where, encoding, "--encoding").split("\n")]
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise InputError(f"{where} is empty")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise InputError(f"{where} line {number} is empty; every line must hold a text")
    return [text_row(meta, line) for line in lines]
