"""Data files → in-memory :class:`datasets.Dataset`, with errors that name the file and the line.

Delimited files are read as text throughout, so that ``NA``, ``None`` and ``01`` stay what they are. CSV follows the
usual quoting rules. TSV has no quoting at all: a tab always separates and a ``"`` is an ordinary character, which is
how GLUE and most tab-separated corpora are written (their fields hold stray, unbalanced quotes). A byte-order mark is
skipped. Rows with too few or too many fields are errors, never padded or cut.

Text is UTF-8 and fields are parted by commas (tabs in TSV) unless the caller says otherwise. Another encoding or
separator is never guessed and used, as a wrong guess changes the texts without a word: the error names what was found
and what to set. Legal JSON may hold half a character (``"\\ud83d"``), and a Parquet file any bytes; neither can be
tokenised, so both are errors with line (or row) and column.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorma.errors import InputError, closest
from lorma.labels import listed

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

EXTENSIONS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}
LOOKED_AT = 20
"""Rows from which another separator is recognised."""
_HALF = re.compile("[\ud800-\udfff]")
_ESCAPED_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


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


def read_file(
    path: Path,
    key: str,
    column_names: list[str] | None = None,
    delimiter: str | None = None,
    encoding: str | None = None,
) -> Dataset:
    """All rows of one data file.

    Args:
        path: a file ending in one of :data:`EXTENSIONS`; ``.gz`` may follow the text formats.
        key: what to call the input in errors, such as ``data.train``.
        column_names: the columns of a CSV or TSV file without a header row.
        delimiter: one character that parts the fields of a CSV or TSV file; None for a comma, or a tab.
        encoding: of a text format, any name Python knows; None for UTF-8.

    Raises:
        InputError: missing file, unknown extension, another encoding or separator, malformed content (with its line),
            text that is no Unicode (with line and column), duplicated columns, or no rows.
    """
    kind, where = _kind(path, key), f"{key} '{path}'"
    for field, value in (("column_names", column_names), ("delimiter", delimiter)):
        if value is not None and kind not in (".csv", ".tsv"):
            what = "may lack a header" if field == "column_names" else "have one"
            raise InputError(f"{_setting(key, field)}: only CSV and TSV files {what}, but {where} is {kind}")
    if kind == ".parquet":
        if encoding is not None:
            raise InputError(f"{_setting(key, 'encoding')}: only text formats have one, but {where} is {kind}")
        table = _read_parquet(path, where)
    elif kind in (".csv", ".tsv"):
        text = read_text(path, where, encoding, _setting(key, "encoding"))
        table = _read_delimited(text, where, kind == ".tsv", column_names, delimiter, _setting(key, "delimiter"))
    else:
        table = _json_table(_json_rows(read_text(path, where, encoding, _setting(key, "encoding")), where))
    if table.num_rows == 0:
        raise InputError(f"{where} holds no rows")

    from datasets import Dataset

    return Dataset(table)


def read_rows(path: Path, key: str, delimiter: str | None = None, encoding: str | None = None) -> list[dict[str, Any]]:
    """The rows of one data file as Python objects, those of JSON exactly as they are written there.

    Args and raises: as :func:`read_file`.
    """
    if _kind(path, key) in (".json", ".jsonl"):
        where = f"{key} '{path}'"
        return [row for _, row in _json_rows(read_text(path, where, encoding, _setting(key, "encoding")), where)]
    rows: list[dict[str, Any]] = read_file(path, key, delimiter=delimiter, encoding=encoding).to_list()
    return rows


def _kind(path: Path, key: str) -> str:
    check_exists(path, key)
    kind = extension(path)
    if kind not in EXTENSIONS or (kind == ".parquet" and path.name.lower().endswith(".gz")):
        raise InputError(
            f"{key}: '{path}' has no known extension; allowed: {', '.join(EXTENSIONS)} (text formats also with .gz)"
        )
    return kind


def _setting(key: str, field: str) -> str:
    """What sets ``field`` for the input that is called ``key``: a recipe's key, or an option of the command line."""
    return f"data.{field}" if key.startswith("data.") else f"--{field}"


def read_text(path: Path, where: str, encoding: str | None = None, setting: str | None = None) -> str:
    """The file's text, unzipped when it ends in ``.gz``, without a byte-order mark.

    Args:
        path: the file.
        where: what to call it in errors.
        encoding: any name Python knows; None for UTF-8.
        setting: what the user sets to give another encoding; None where there is no such thing.

    Raises:
        InputError: it cannot be read, or is not in this encoding; names the one it seems to be in.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.name.lower().endswith(".gz") else path.read_bytes()
    except (OSError, EOFError) as error:
        raise InputError(f"{where} cannot be read: {error}") from error
    try:
        text = raw.decode(encoding or "utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        fault = f"{where} is not {(encoding or 'utf-8').upper()}: byte 0x{raw[error.start]:02x} in line {line}"
        raise InputError(fault + _hint(_guess_encoding(raw), encoding, setting)) from error
    except UnicodeError as error:  # UTF-16 and UTF-32 without the mark they need
        raise InputError(f"{where} is not {(encoding or 'utf-8').upper()}: {error}") from error
    if encoding is None and (found := _wide(raw)):
        raise InputError(f"{where} is not UTF-8" + _hint(found, encoding, setting))
    return text.removeprefix("\ufeff")


def _hint(found: str, encoding: str | None, setting: str | None) -> str:
    if found == encoding:
        return ""
    return f"; it seems to be {found}: " + (f"set {setting} to {found}" if setting else "save it as UTF-8")


def _wide(raw: bytes) -> str | None:
    """UTF-16 or UTF-32, told by a byte-order mark or by the zeros in every other byte; None where neither is there."""
    for mark, name in _MARKS:
        if raw.startswith(mark):
            return name
    start = raw[:4096]
    for offset, name in ((1, "utf-16-le"), (0, "utf-16-be")):
        if len(start) > 3 and start[offset::2].count(0) > len(start) // 4 > 2 * start[1 - offset :: 2].count(0):
            return name
    return None


def _guess_encoding(raw: bytes) -> str:
    """What bytes that are not UTF-8 are most likely to be."""
    wide = _wide(raw)
    if wide is not None:
        return wide
    try:
        raw.decode("cp1252")
    except UnicodeDecodeError:
        return "latin-1"
    return "cp1252"


def _read_delimited(
    text: str, where: str, tabs: bool, column_names: list[str] | None, delimiter: str | None, setting: str
) -> pa.Table:
    import pyarrow as pa

    own = delimiter or ("\t" if tabs else ",")

    def hint() -> str:
        """Which other separator the file has, where none was asked for and one fits."""
        other = None if delimiter else _other_delimiter(text, tabs, own, column_names)
        return f"; its separator seems to be the {DELIMITERS[other]}: set {setting} to {other!r}" if other else ""

    rows = _delimited_rows(text, where, tabs, own)
    first = next(rows, None)
    if first is None:
        raise InputError(f"{where} is empty")
    records = [] if column_names is None else [first[1]]
    names = first[1] if column_names is None else column_names
    if len(first[1]) != len(names):
        raise InputError(f"data.column_names: {len(names)} names for the {len(first[1])} columns of {where}{hint()}")
    if len(first[1]) == 1 and column_names is None and (found := hint()):
        raise InputError(f"{where} has the one column {names[0]!r}{found}")
    _check_distinct(names, where)
    try:
        for line, fields in rows:
            if len(fields) != len(names):
                raise InputError(f"{where} line {line}: {len(fields)} fields where {len(names)} columns are expected")
            records.append(fields)
    except InputError as error:
        raise InputError(f"{error}{hint()}") from error
    return pa.table(
        [pa.array([record[i] for record in records], pa.large_string()) for i in range(len(names))], names=names
    )


def _other_delimiter(text: str, tabs: bool, own: str, column_names: list[str] | None) -> str | None:
    """A usual separator other than ``own`` that gives every row as many fields as the first, and more than one."""
    for candidate in DELIMITERS:
        if candidate == own:
            continue
        try:
            rows = islice(_delimited_rows(text, "", tabs, candidate), LOOKED_AT)
            widths = {len(fields) for _, fields in rows}
        except InputError:
            continue
        if len(widths) == 1 and (len(column_names) if column_names else max(2, *widths)) in widths:
            return candidate
    return None


class _Unquoted(csv.excel):
    quoting = csv.QUOTE_NONE


def _delimited_rows(text: str, where: str, tabs: bool, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Pairs of (line the record starts on, fields), blank lines left out."""
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, _Unquoted if tabs else csv.excel, strict=True, delimiter=delimiter)
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
    check_unicode(table, where)
    return table


def check_unicode(table: pa.Table, where: str) -> None:
    """Raise :class:`InputError` naming row and column for text in a table whose bytes are not UTF-8."""
    import pyarrow as pa

    for name, column in zip(table.column_names, table.columns, strict=True):
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            for row, cell in enumerate(column, start=1):
                try:
                    cell.as_py()
                except UnicodeDecodeError as fault:
                    raise InputError(f"{where} row {row}, column {name!r}: not UTF-8: {fault.reason}") from error
            raise InputError(f"{where}, column {name!r}: {str(error).splitlines()[0]}") from error


def half_character(value: object) -> str | None:
    """The first code point in a JSON value that is half of one (a lone surrogate), as ``\\ud83d``; None: there is none.

    Half of an emoji is legal in JSON, and in Python's text, but it is no Unicode and no tokenizer takes it.
    """
    if isinstance(value, str):
        found = _HALF.search(value)
        return f"\\u{ord(found[0]):04x}" if found else None
    parts: Iterable[object] = ()
    if isinstance(value, dict):
        parts = (part for item in value.items() for part in item)
    elif isinstance(value, list):
        parts = value
    return next((half for part in parts if (half := half_character(part))), None)


def _json_rows(text: str, where: str) -> list[tuple[str, dict[str, Any]]]:
    """Pairs of (place in the file, object): of JSON lines, or of one array of objects."""
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
    if _ESCAPED_HALF.search(text) or _HALF.search(text):
        for place, row in rows:
            for name, value in row.items():
                if half := half_character([name, value]):
                    shown = name.encode(errors="backslashreplace").decode()
                    raise InputError(
                        f"{where} {place}, column {shown!r}: {half} is half a character, so no Unicode text"
                    )
    return rows


def _json_table(rows: list[tuple[str, dict[str, Any]]]) -> pa.Table:
    """A column for each key; a key absent from an object is an empty cell."""
    import pyarrow as pa

    names = dict.fromkeys(name for _, row in rows for name in row)
    columns = {name: _column([row.get(name) for _, row in rows]) for name in names}
    return pa.table(list(columns.values()), names=list(columns))


def _parse(text: str, where: str, line: int | None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} line {line or error.lineno}: malformed JSON: {error.msg}") from error


def _column(values: list[Any]) -> pa.Array:
    """An Arrow column. Values that share no type (``1`` beside ``"a"``) are kept as text.

    So are nested ones that Arrow would change: it gives every object in a column the keys of all the others, and an
    argument of one tool call would become an empty argument of another.
    """
    import pyarrow as pa

    try:
        array = pa.array(values)
        if not pa.types.is_nested(array.type) or _survives(values, array):
            return array
    except (pa.ArrowException, OverflowError):
        pass
    texts = [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
    return pa.array(texts, pa.large_string())


def _survives(values: list[Any], array: pa.Array) -> bool:
    """Whether Arrow gives nested values back as they were, with no empty place in them whose meaning is open."""
    return all(
        before is None or ((written := json.dumps(before)) == json.dumps(after) and "null" not in written)
        for before, after in zip(values, array.to_pylist(), strict=True)
    )
