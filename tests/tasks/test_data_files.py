import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorma.errors import InputError
from lorma.tasks.files import read_file

Write = Callable[[str, str | bytes], str]


def rows(path: str, column_names: list[str] | None = None) -> list[dict[str, object]]:
    found: list[dict[str, object]] = read_file(Path(path), "data.train", column_names).to_list()
    return found


def test_csv_with_bom_quotes_and_accents(write: Write) -> None:
    content = '\ufeffpremise,claim,label\r\n"Hé, you",is it?,NA\r\n"She said ""no""\nand left",01,None\r\n\r\nx,y,\r\n'
    assert rows(write("a.csv", content)) == [
        {"premise": "Hé, you", "claim": "is it?", "label": "NA"},
        {"premise": 'She said "no"\nand left', "claim": "01", "label": "None"},
        {"premise": "x", "claim": "y", "label": ""},
    ]


def test_tsv_quotes_are_ordinary_characters(write: Write) -> None:
    path = write("a.tsv", 'text\tlabel\n"stray\t1\nhe said "no\t0\n')
    assert rows(path) == [{"text": '"stray', "label": "1"}, {"text": 'he said "no', "label": "0"}]


def test_header_less_files_and_gzip(write: Write) -> None:
    path = write("a.tsv.gz", gzip.compress(b"gj04\t1\t\tGood.\ngj04\t0\t*\tBad.\n"))
    assert rows(path, ["source", "label", "mark", "sentence"])[1] == {
        "source": "gj04",
        "label": "0",
        "mark": "*",
        "sentence": "Bad.",
    }


def test_json_lines_keep_late_keys_and_mixed_types(write: Write) -> None:
    path = write("a.jsonl", '{"a": 1}\n\n{"a": "x\u2028y", "b": [1]}\n{"a": true, "b": null}\n')
    assert rows(path) == [{"a": "1", "b": None}, {"a": "x\u2028y", "b": [1]}, {"a": "true", "b": None}]


def test_json_array(write: Write) -> None:
    assert rows(write("a.json", json.dumps([{"a": 1}, {"a": 2.5}], indent=1))) == [{"a": 1.0}, {"a": 2.5}]


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "label": [True]}), tmp_path / "a.parquet")
    assert rows(str(tmp_path / "a.parquet")) == [{"text": "a", "label": True}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "is empty"),
        ("a.csv", "text,label\n", "holds no rows"),
        ("a.jsonl", "\n", "holds no rows"),
        ("a.csv", "text,label\na,1\nb,2,3\n", "line 3: 3 fields where 2 columns are expected"),
        ("a.csv", "text,label\na\n", "line 2: 1 fields where 2 columns are expected"),
        ("a.csv", 'text,label\n"two\nlines",1\n"x"y,1\n', "line 4: malformed: ',' expected after '\"'"),
        ("a.csv", 'text,label\na,1\n"b,1\nc,1\n', "line 3: malformed: unexpected end of data"),
        ("a.csv", "text,text\na,1\n", "duplicated column names: 'text'"),
        ("a.csv", b"text,label\ncaf\xe9,1\n", "is not UTF-8: byte 0xe9 in line 2"),
        ("a.tsv.gz", "text", "cannot be read: Not a gzipped file"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', "line 2: malformed JSON: Expecting value"),
        ("a.jsonl", '{"a": 1}\n3\n', "line 2: a JSON object is expected, not int"),
        ("a.json", '[\n{"a": 1},\n]', "line [23]: malformed JSON"),
        ("a.parquet", "no", "is not a Parquet file"),
        ("a.xlsx", "no", r"no known extension; allowed: \.csv, \.tsv"),
        ("a.parquet.gz", "no", "no known extension"),
    ],
)
def test_unusable_files(write: Write, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        rows(write(name, content))
    assert str(caught.value).startswith("data.train")
    assert "\n" not in str(caught.value)


def test_column_names_must_fit(write: Write) -> None:
    with pytest.raises(InputError, match=r"data\.column_names: 2 names for the 3 columns"):
        rows(write("a.csv", "1,2,3\n"), ["a", "b"])
    with pytest.raises(InputError, match=r"data\.column_names: only CSV and TSV files .* is \.jsonl"):
        rows(write("a.jsonl", "{}"), ["a", "b"])


def test_a_missing_file_suggests_its_neighbour(write: Write) -> None:
    path = write("train.csv", "text\na\n")
    with pytest.raises(InputError, match=r"trian\.csv' does not exist; did you mean '.*train\.csv'\?"):
        rows(path.replace("train.csv", "trian.csv"))


def test_very_long_fields(write: Write) -> None:
    assert rows(write("a.csv", "text\n" + "x" * 200_000 + "\n")) == [{"text": "x" * 200_000}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text;label\na, b;1\n", r"one column 'text;label'; .* is the|be the semicolon: set data\.delimiter"),
        ("a.csv", "text,x;label\na;1\n", r"line 2: 1 fields .* semicolon: set data\.delimiter to ';'"),
        ("a.tsv", "text,label\na,1\n", r"be the comma: set data\.delimiter to ','"),
        ("a.csv", "text|label\na|1\n", r"be the vertical bar: set data\.delimiter to '\|'"),
        (
            "a.csv",
            "text,label\nS\xfc\xdf \x80,1\n".encode("latin-1"),
            "in line 2; it seems to be cp1252: set data.encoding",
        ),
        ("a.csv", "text,label\né,1\n".encode("utf-16"), "seems to be utf-16: set data.encoding to utf-16"),
        ("a.csv", "text,label\na,1\n".encode("utf-16-le"), "seems to be utf-16-le: set data.encoding"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16-be"), "seems to be utf-16-be: set data.encoding"),
        ("a.jsonl", '{"a": "x"}\n{"a": "\\ud83d"}\n', r"line 2, column 'a': \\ud83d is half a character"),
        ("a.json", '[{"a": [{"content": "\\uDE00 x"}]}]', r"item 1, column 'a': \\ude00 is half a character"),
    ],
)
def test_other_separators_and_encodings_are_named(write: Write, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        rows(write(name, content))
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-le", "utf-8", "utf-8-sig"])
def test_the_separator_and_the_encoding_can_be_set(write: Write, encoding: str) -> None:
    path = write(
        "a.csv", "\ufeff"[: encoding == "utf-16-le"].encode(encoding) + 'text;n\n"Süß; 5 €";1\n'.encode(encoding)
    )
    read = read_file(Path(path), "data.train", None, ";", encoding).to_list()
    assert read == [{"text": "Süß; 5 €", "n": "1"}]


def test_one_column_whose_texts_hold_semicolons(write: Write) -> None:
    assert rows(write("a.csv", "text\na; b\nc; d\n")) == [{"text": "a; b"}, {"text": "c; d"}]


def test_whole_emoji_are_text(write: Write) -> None:
    assert rows(write("a.jsonl", '{"a": "\\ud83d\\ude00"}')) == [{"a": "\U0001f600"}]


def test_parquet_text_that_is_no_utf_8(tmp_path: Path) -> None:
    bad = pa.array([b"a", b"\xff"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"row 2, column 'text': not UTF-8"):
        rows(str(tmp_path / "a.parquet"))


def test_objects_keep_their_own_keys(write: Write) -> None:
    calls = [
        [{"arguments": {"city": "Riga"}}],
        [{"arguments": {"days": 3, "unit": None}}],
        [{"arguments": {"days": 3.5}}],
    ]
    read = rows(write("a.jsonl", "".join(json.dumps({"m": call}) + "\n" for call in calls)))
    assert [json.loads(str(row["m"])) for row in read] == calls
