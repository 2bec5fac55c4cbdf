"""Data files → in-memory :class:`datasets.Dataset`, with errors that name the file and the line.

Delimited files are read as text throughout, so that ``NA``, ``None`` and ``01`` stay what they are. CSV follows the
usual quoting rules. TSV has no quoting at all: a tab always separates and a ``"`` is an ordinary character, which is
how GLUE and most tab-separated corpora are written (their fields hold stray, unbalanced quotes). A byte-order mark is
skipped. Rows with too few or too many fields are errors, never padded or cut.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorma.errors import InputError, closest
from lorma.tasks.labels import listed

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

EXTENSIONS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


def extension(path: Path) -> str:
    """The lower-case extension that tells the format, with a final ``.gz`` left out."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def check_exists(path: Path, key: str) -> None:
    """Raise :class:`InputError` naming ``key``, the path and a similarly named neighbour, unless ``path`` is a file."""
    if path.is_file():
        return
    if path.is_dir():
        raise InputError(f"{key}: '{path}' is a directory, not a file")
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = closest(path.name, beside, limit=1)
    hint = f"; did you mean '{path.parent / near[0]}'?" if near else ""
    raise InputError(f"{key}: file '{path}' does not exist{hint}")


def read_file(path: Path, key: str, column_names: list[str] | None = None) -> Dataset:
    """All rows of one data file.

    Args:
        path: a file ending in one of :data:`EXTENSIONS`; ``.gz`` may follow the text formats.
        key: what to call the input in errors, such as ``data.train``.
        column_names: the columns of a CSV or TSV file without a header row.

    Raises:
        InputError: missing file, unknown extension, not UTF-8, malformed content (with its line), duplicated
            columns, or no rows.
    """
    check_exists(path, key)
    kind = extension(path)
    if kind not in EXTENSIONS or (kind == ".parquet" and path.name.lower().endswith(".gz")):
        raise InputError(
            f"{key}: '{path}' has no known extension; allowed: {', '.join(EXTENSIONS)} (text formats also with .gz)"
        )
    where = f"{key} '{path}'"
    if column_names is not None and kind not in (".csv", ".tsv"):
        raise InputError(f"data.column_names: only CSV and TSV files may lack a header, but {where} is {kind}")
    if kind == ".parquet":
        table = _read_parquet(path, where)
    elif kind in (".csv", ".tsv"):
        table = _read_delimited(read_text(path, where), where, kind == ".tsv", column_names)
    else:
        table = _read_json(read_text(path, where), where)
    if table.num_rows == 0:
        raise InputError(f"{where} holds no rows")

    from datasets import Dataset

    return Dataset(table)


def read_text(path: Path, where: str) -> str:
    """The file's text, unzipped when it ends in ``.gz``, without a byte-order mark."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.name.lower().endswith(".gz") else path.read_bytes()
    except (OSError, EOFError) as error:
        raise InputError(f"{where} cannot be read: {error}") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise InputError(f"{where} is not UTF-8: byte 0x{raw[error.start]:02x} in line {line}") from error


def _read_delimited(text: str, where: str, tabs: bool, column_names: list[str] | None) -> pa.Table:
    import pyarrow as pa

    rows = _delimited_rows(text, where, tabs)
    first = next(rows, None)
    if first is None:
        raise InputError(f"{where} is empty")
    records = [] if column_names is None else [first[1]]
    names = first[1] if column_names is None else column_names
    if len(first[1]) != len(names):
        raise InputError(f"data.column_names: {len(names)} names for the {len(first[1])} columns of {where}")
    _check_distinct(names, where)
    for line, fields in rows:
        if len(fields) != len(names):
            raise InputError(f"{where} line {line}: {len(fields)} fields where {len(names)} columns are expected")
        records.append(fields)
    return pa.table(
        [pa.array([record[i] for record in records], pa.large_string()) for i in range(len(names))], names=names
    )


class _Tabs(csv.excel_tab):
    quoting = csv.QUOTE_NONE


def _delimited_rows(text: str, where: str, tabs: bool) -> Iterator[tuple[int, list[str]]]:
    """Pairs of (line the record starts on, fields), blank lines left out."""
    lines = io.StringIO(text, newline="")
    dialect = _Tabs if tabs else csv.excel
    reader = csv.reader(lines, dialect, strict=True)
    start = 1
    with _long_fields():
        try:
            for fields in reader:
                if fields:
                    yield start, fields
                start = reader.line_num + 1
        except csv.Error as error:
            raise InputError(f"{where} line {start}: malformed: {error}") from error


@contextmanager
def _long_fields() -> Iterator[None]:
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _check_distinct(names: list[str], where: str) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError(f"{where} has duplicated column names: {listed(repeated)}")


def _read_parquet(path: Path, where: str) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path).read()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{where} is not a Parquet file: {str(error).splitlines()[0]}") from error
    _check_distinct(table.column_names, where)
    return table


def _read_json(text: str, where: str) -> pa.Table:
    """JSON lines, or one array of objects; a key absent from an object is an empty cell."""
    import pyarrow as pa

    rows: list[tuple[str, Any]]
    if text.lstrip().startswith("["):
        whole = _parse(text, where, line=None)
        rows = [(f"item {number}", row) for number, row in enumerate(whole, start=1)]
    else:
        lines = enumerate(text.split("\n"), start=1)
        rows = [(f"line {number}", _parse(line, where, number)) for number, line in lines if line.strip()]
    for place, row in rows:
        if not isinstance(row, dict):
            raise InputError(f"{where} {place}: a JSON object is expected, not {type(row).__name__}")
    names = dict.fromkeys(name for _, row in rows for name in row)
    columns = {name: _column([row.get(name) for _, row in rows]) for name in names}
    return pa.table(list(columns.values()), names=list(columns))


def _parse(text: str, where: str, line: int | None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} line {line or error.lineno}: malformed JSON: {error.msg}") from error


def _column(values: list[Any]) -> pa.Array:
    """An Arrow column; values that share no type (``1`` beside ``"a"``) are kept as text."""
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):
        texts = [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
        return pa.array(texts, pa.large_string())
