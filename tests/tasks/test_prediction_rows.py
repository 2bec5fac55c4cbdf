from collections.abc import Callable

import pytest

from lorma.errors import InputError
from lorma.tasks import input_columns, read_prediction_rows, text_row

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
