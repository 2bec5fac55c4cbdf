import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from lorma.errors import InputError
from lorma.tasks import DataSpec, load_splits
from lorma.tasks.fingerprint import fingerprints
from lorma.tasks.movie_reviews import load_movie_reviews

Write = Callable[[str, str | bytes], str]


@pytest.fixture
def hundred(write: Write) -> str:
    return write("hundred.csv", "text,label\n" + "".join(f"text {i},{i % 2}\n" for i in range(1, 101)))


def test_held_out_rows_are_fixed_and_disjoint(hundred: str) -> None:
    first, again = (load_splits(DataSpec(train=hundred, eval_fraction=0.25)) for _ in range(2))
    assert (len(first.train.data), len(first.eval.data)) == (75, 25)
    assert first.eval.data["text"][:] == again.eval.data["text"][:]
    assert sorted([*first.train.numbers, *first.eval.numbers]) == list(range(1, 101))
    assert first.eval.data["text"][:] == [f"text {number}" for number in first.eval.numbers]
    other = load_splits(DataSpec(train=hundred, eval_fraction=0.25, split_seed=1))
    assert list(other.eval.numbers) != list(first.eval.numbers)


def test_subsets_are_nested_and_keep_row_numbers(hundred: str) -> None:
    small, large = (load_splits(DataSpec(train=hundred, eval=hundred, max_train_rows=n)).train for n in (10, 30))
    assert set(small.numbers) < set(large.numbers)
    assert small.text("text", "text") == [f"text {number}" for number in small.numbers]
    assert load_splits(DataSpec(train=hundred, eval=hundred, max_eval_rows=7)).eval.source == "data.eval"


def test_one_row_cannot_be_split(write: Write) -> None:
    with pytest.raises(InputError, match=r"data\.train holds 1 row; holding out data\.eval_fraction needs at least 2"):
        load_splits(DataSpec(train=write("a.csv", "text\nx\n")))


def test_columns_are_checked(write: Write) -> None:
    path = write("a.jsonl", '{"text": "a", "size": 1}\n{"text": " ", "size": 2}\n')
    rows = load_splits(DataSpec(train=path, eval=path)).train
    with pytest.raises(InputError, match=r"data\.text: data\.train has no column 'txt'; .* 'text', 'size'; did you"):
        rows.text("text", "txt")
    with pytest.raises(InputError, match=r"data\.text: column 'text' is empty in data\.train row 2"):
        rows.text("text", "text")
    with pytest.raises(InputError, match=r"column 'size' is int 1 in data\.train row 1; allowed: text"):
        rows.text("text", "size")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": "movie_review"}, r"data\.train: 'movie_review' is no file.*did you mean 'movie_reviews'\?"),
        ({"train": "movie_reviews", "eval": "nowhere.csv"}, r"data\.eval: file 'nowhere\.csv' does not exist"),
        ({"train": "movie_reviews", "eval_split": "test"}, r"data\.eval_split: 'test' applies only to directories"),
        ({"train": "movie_reviews", "config": "en"}, r"data\.config: 'en' applies only to directories"),
        ({"train": "movie_reviews", "column_names": ["a"]}, r"data\.column_names: only CSV and TSV"),
        ({"train": "movie_reviews", "eval": "org/name"}, r"data\.eval_split: is needed when data\.eval is"),
        ({"train": "org/name"}, r"data\.train: 'org/name' is no local file .*org/name"),
        ({"train": "org/name", "column_names": ["a"]}, r"data\.column_names: only CSV and TSV"),
    ],
)
def test_unusable_sources(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_splits(DataSpec.model_validate(fields))
    assert "\n" not in str(caught.value)


def test_a_directory_with_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    for name, count in (("train", 3), ("test", 2)):
        lines = [json.dumps({"text": f"{name} {i}"}) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    splits = load_splits(DataSpec(train=str(folder), eval_split="test"))
    assert splits.train.text("text", "text") == ["train 0", "train 1", "train 2"]
    assert splits.eval.text("text", "text") == ["test 0", "test 1"]
    with pytest.raises(InputError, match=r"data\.train: .* cannot be read .* Unknown split \"dev\""):
        load_splits(DataSpec(train=str(folder), eval_split="dev"))


def test_a_fingerprint_is_of_the_content(write: Write, tmp_path: Path) -> None:
    spec = DataSpec(train=write("a.csv", "text,label\nx,1\n"), eval=write("b.csv", "text,label\nx,1\n"))
    first = fingerprints(spec)
    assert set(first) == {"data.train", "data.eval"}
    assert first["data.train"] == first["data.eval"]
    write("b.csv", "text,label\nx,2\n")
    second = fingerprints(spec)
    assert second["data.train"] == first["data.train"]
    assert second["data.eval"] != first["data.eval"]
    write("b.csv", "text,label\nx,1\n")
    assert fingerprints(spec) == first


def test_the_fingerprint_of_a_directory_is_of_the_data_in_it(tmp_path: Path) -> None:
    """A run directory may lie beside the data, and grows while it is trained."""
    spec = DataSpec(train=str(tmp_path))
    (tmp_path / "train.csv").write_text("text\nx\n")
    (tmp_path / "runs" / "one").mkdir(parents=True)
    first = fingerprints(spec)
    (tmp_path / "runs" / "one" / "metrics.jsonl").write_text('{"step": 1}\n')
    assert fingerprints(spec) == first
    (tmp_path / "train.csv").write_text("text\ny\n")
    second = fingerprints(spec)
    (tmp_path / "test.csv").write_text("text\nz\n")
    assert len({str(found) for found in (first, second, fingerprints(spec))}) == 3


@pytest.mark.parametrize("name", ["movie_reviews", "nowhere.csv", "no/where.csv", "org/name", "neither"])
def test_what_is_packaged_or_cannot_be_read_has_no_fingerprint(name: str) -> None:
    assert fingerprints(DataSpec(train=name)) == {}


def test_movie_reviews_counts() -> None:
    everything = [load_movie_reviews(part, False) for part in ("train", "eval")]
    assert [len(part) for part in everything] == [8484, 2120]
    assert everything[0].column_names == ["id", "text", "rating"]
    assert not set(everything[0]["text"]) & set(everything[1]["text"])
    assert all(identifier % 5 == 0 for identifier in everything[1]["id"])
    assert all(-4 <= rating <= 4 for rating in everything[0]["rating"])


def test_movie_reviews_sentiment() -> None:
    train, held = (load_movie_reviews(part, True) for part in ("train", "eval"))
    assert Counter(train["label"]) == {"negative": 4067, "positive": 3993}
    assert Counter(held["label"]) == {"negative": 1008, "positive": 1003}
    assert all((r["label"] == "positive") == (r["rating"] >= 0.5) and abs(r["rating"]) >= 0.5 for r in held)
