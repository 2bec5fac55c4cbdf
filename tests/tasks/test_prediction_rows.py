import json
from collections.abc import Callable
from datetime import date

import pytest

from lorma.errors import InputError
from lorma.tasks import answer_line, input_columns, kept_columns, read_prediction_rows, text_row

Write = Callable[[str, str | bytes], str]
TEXT = {"task": "classification", "format": "text", "text": "sentence", "text_pair": None}
PAIR = {**TEXT, "text_pair": "claim"}
PROMPT = {"task": "causal-lm", "format": "prompt-completion", "text": None, "prompt": "q", "completion": "a"}
CHAT = {"task": "causal-lm", "format": "messages", "text": None, "messages": "m"}


def test_a_bare_text_becomes_a_row() -> None:
    assert text_row(TEXT, "x") == {"sentence": "x"}
    assert text_row(PAIR, "x", "y") == {"sentence": "x", "claim": "y"}
    assert text_row(PROMPT, "x") == {"q": "x"}
    assert text_row(CHAT, "x") == {"m": [{"role": "user", "content": "x"}]}
    with pytest.raises(
        InputError, match="text_pair: the task 'classification' of this adapter takes two texts, one is"
    ):
        text_row(PAIR, "x")
    with pytest.raises(InputError, match="takes one text, two are given"):
        text_row(TEXT, "x", "y")
    assert input_columns(PAIR) == {"text": "sentence", "text_pair": "claim"}


def test_text_files_hold_one_text_a_line(write: Write) -> None:
    path = write("a.txt", '\ufeffone, "two\r\nthrée\r\n')
    assert read_prediction_rows(path, TEXT) == [{"sentence": 'one, "two'}, {"sentence": "thrée"}]


def test_tables_keep_all_their_columns(write: Write) -> None:
    path = write("a.csv", "id,sentence\n7,x\n")
    assert read_prediction_rows(path, TEXT) == [{"id": "7", "sentence": "x"}]
    chats = write("a.jsonl", '{"m": [{"role": "user", "content": "Hi"}]}\n')
    assert read_prediction_rows(chats, CHAT) == [{"m": [{"role": "user", "content": "Hi"}]}]


@pytest.mark.parametrize(
    ("name", "content", "meta", "message"),
    [
        ("a.txt", "a\n\nb\n", TEXT, r"--file '.*a\.txt' line 2 is empty; every line must hold a text"),
        ("a.txt", "", TEXT, "is empty"),
        ("a.txt", "a\n", PAIR, r"this adapter reads pairs of texts; allowed: \.csv"),
        ("a.csv", "sentense\nx\n", TEXT, r"data\.text: --file has no column 'sentence'; .*did you mean 'sentense'"),
        ("a.csv", "q,a\nx,1\n,2\n", PROMPT, r"data\.prompt: column 'q' is empty in --file row 2"),
        ("a.jsonl", '{"m": [{"role": "bot", "content": ""}]}', CHAT, "--file row 1, message 1: role is 'bot'"),
        ("a.pdf", "x", TEXT, r"no known extension; allowed: \.txt, \.csv"),
    ],
)
def test_unusable_prediction_files(
    write: Write, name: str, content: str, meta: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_prediction_rows(write(name, content), meta)


def test_a_missing_prediction_file(write: Write) -> None:
    with pytest.raises(InputError, match=r"--file: file 'nowhere\.txt' does not exist"):
        read_prediction_rows("nowhere.txt", TEXT)


def test_answers_lie_beside_all_columns_under_names_of_their_own() -> None:
    rows = [
        {"id": 7, "sentence": "x", "label": "bad"},
        {"id": 8, "sentence": "y", "day": date(2024, 5, 1), "n": float("nan")},
    ]
    kept = kept_columns(rows, TEXT)
    assert kept == ["id", "sentence", "label", "day", "n"]
    first, second = (json.loads(answer_line(row, {"label": "good", "score": 0.5}, kept)) for row in rows)
    assert first == {
        "id": 7,
        "sentence": "x",
        "label": "bad",
        "day": None,
        "n": None,
        "predicted_label": "good",
        "score": 0.5,
    }
    assert (second["day"], second["n"], second["label"]) == ("2024-05-01", None, None)
    assert json.loads(answer_line(rows[0], {"value": 1.5}, [])) == {"predicted_value": 1.5}
    assert json.loads(answer_line(rows[0], {"completion": "z"}, ["id"])) == {"id": 7, "predicted_completion": "z"}


def test_columns_are_chosen_and_may_not_be_called_like_an_answer() -> None:
    rows = [{"sentence": "x", "score": 1}]
    assert kept_columns(rows, TEXT, ["sentence"]) == ["sentence"]
    assert kept_columns(rows, TEXT, written=False) == ["sentence"]
    assert kept_columns(rows, {**TEXT, "task": "regression"}) == ["sentence", "score"]
    with pytest.raises(
        InputError, match="the input has a column 'score', which is what an answer is called; .*--columns"
    ):
        kept_columns(rows, TEXT)
    with pytest.raises(InputError, match="--columns: the input has no column 'sentense'; .*did you mean 'sentence'"):
        kept_columns(rows, TEXT, ["sentense"])


def test_rows_of_json_stay_as_they_are_written(write: Write) -> None:
    row = {"m": [{"role": "user", "content": "Hi"}], "more": {"a": None, "b": [1, 2.5]}, "label": "1"}
    path = write("a.jsonl", json.dumps(row) + "\n" + json.dumps({**row, "more": {"c": 1}}) + "\n")
    assert read_prediction_rows(path, CHAT)[0] == row


def test_separator_and_encoding_of_a_prediction_file(write: Write) -> None:
    path = write("a.csv", "sentence;n\nSüß;1\n".encode("cp1252"))
    with pytest.raises(InputError, match="seems to be cp1252: set --encoding to cp1252"):
        read_prediction_rows(path, TEXT)
    with pytest.raises(InputError, match="the semicolon: set --delimiter to ';'"):
        read_prediction_rows(path, TEXT, encoding="cp1252")
    assert read_prediction_rows(path, TEXT, delimiter=";", encoding="cp1252") == [{"sentence": "Süß", "n": "1"}]
    with pytest.raises(InputError, match="--delimiter='ab': allowed: one character"):
        read_prediction_rows(path, TEXT, delimiter="ab")
    with pytest.raises(InputError, match="--encoding='klingon': no text encoding"):
        read_prediction_rows(path, TEXT, encoding="klingon")
    assert read_prediction_rows(write("a.txt", "Süß\n".encode("utf-16")), TEXT, encoding="utf-16") == [
        {"sentence": "Süß"}
    ]


def test_a_text_of_the_command_line_that_is_no_unicode() -> None:
    with pytest.raises(InputError, match=r"--text: \\udcff is no Unicode"):
        text_row(TEXT, "a\udcff")
