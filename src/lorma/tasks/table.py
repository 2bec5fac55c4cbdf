"""From a :class:`DataSpec` to training and evaluation rows, whatever kind of source each comes from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorma.errors import InputError, closest, did_you_mean
from lorma.labels import listed
from lorma.schema import DataSpec
from lorma.tasks.files import EXTENSIONS, check_exists, check_unicode, extension, read_file
from lorma.tasks.movie_reviews import load_movie_reviews

if TYPE_CHECKING:
    from datasets import Dataset

Part = Literal["train", "eval"]
PACKAGED: dict[str, Callable[[Part, bool], Dataset]] = {"movie_reviews": load_movie_reviews}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Rows:
    """Some rows of one source.

    Attributes:
        data: the rows.
        source: what errors call the source: ``data.train`` or ``data.eval``, or the option of a prediction file.
        numbers: for each row its number in the source, counted from 1.
    """

    data: Dataset
    source: str
    numbers: Sequence[int]

    def column(self, field: str, name: str) -> list[Any]:
        """The values of column ``name``, which the recipe key ``data.<field>`` asked for.

        Raises:
            InputError: no such column; the message lists those there are.
        """
        columns = self.data.column_names
        if name not in columns:
            raise InputError(
                f"data.{field}: {self.source} has no column {name!r}; "
                f"its columns are {listed(columns)}{did_you_mean(name, columns)}"
            )
        values: list[Any] = self.data.select_columns(name)[:][name]
        return values

    def text(self, field: str, name: str) -> list[str]:
        """As :meth:`column`, for text; a cell that is no text, or blank, raises :class:`InputError` with its row."""
        values = self.column(field, name)
        for number, value in zip(self.numbers, values, strict=True):
            if value is None or (isinstance(value, str) and not value.strip()):
                raise InputError(f"data.{field}: column {name!r} is empty in {self.source} row {number}")
            if not isinstance(value, str):
                raise InputError(
                    f"data.{field}: column {name!r} is {type(value).__name__} {value!r} in {self.source} "
                    f"row {number}; allowed: text"
                )
        return values

    def subset(self, size: int | None, seed: int) -> Rows:
        """``size`` rows picked by a shuffle that ``seed`` fixes, in their old order; all of them for ``None``."""
        if size is None or size >= len(self.numbers):
            return self
        return self._take(_shuffled(len(self.numbers), seed)[:size])

    def held_out(self, fraction: float, seed: int) -> tuple[Rows, Rows]:
        """Training and evaluation rows, of which ``fraction`` (at least one row) are for evaluation."""
        total = len(self.numbers)
        if total < 2:
            raise InputError(f"{self.source} holds {total} row; holding out data.eval_fraction needs at least 2")
        held = min(max(1, round(fraction * total)), total - 1)
        order = _shuffled(total, seed)
        return self._take(order[held:]), self._take(order[:held])

    def _take(self, indices: list[int]) -> Rows:
        kept = sorted(indices)
        data = self.data.select(kept, keep_in_memory=True)
        return replace(self, data=data, numbers=[self.numbers[i] for i in kept])


@dataclass(frozen=True)
class Splits:
    """``train`` and ``eval`` as asked for, and ``source``: every row of the training source, whose labels make up
    the classes even when only some of its rows are kept."""

    train: Rows
    eval: Rows
    source: Rows


def all_rows(data: Dataset, source: str) -> Rows:
    """Every row of ``data``, numbered from 1."""
    return Rows(data, source, range(1, len(data) + 1))


def load_splits(spec: DataSpec, sentiment: bool = False) -> Splits:
    """The training and evaluation rows that ``spec`` describes.

    Args:
        spec: the recipe's ``data`` section.
        sentiment: for packaged data sets, give ``negative``/``positive`` labels and leave out neutral rows.

    Raises:
        InputError: a source that does not exist or cannot be read, or a key that does not apply to it.
    """
    source = all_rows(_load(spec, "train", sentiment), "data.train")
    if spec.eval is None and spec.eval_split is None and spec.train not in PACKAGED:
        train, held = source.held_out(spec.eval_fraction, spec.split_seed)
    else:
        key = "data.eval" if spec.eval is not None or spec.eval_split is None else "data.eval_split"
        train, held = source, all_rows(_load(spec, "eval", sentiment), key)
    return Splits(
        train.subset(spec.max_train_rows, spec.split_seed), held.subset(spec.max_eval_rows, spec.split_seed), source
    )


def kind_of_source(name: str) -> Literal["packaged", "directory", "file", "hub"] | None:
    """What ``data.train`` or ``data.eval`` names; a file or hub data set need not exist. None: it can be neither."""
    path = Path(name).expanduser()
    if name in PACKAGED:
        return "packaged"
    if path.is_dir():
        return "directory"
    if path.is_file() or extension(path) in EXTENSIONS:
        return "file"
    return "hub" if _HUB_NAME.fullmatch(name) else None


def _load(spec: DataSpec, part: Part, sentiment: bool) -> Dataset:
    key = "data.eval" if part == "eval" and spec.eval is not None else "data.train"
    name = spec.eval if part == "eval" and spec.eval is not None else spec.train
    path = Path(name).expanduser()
    kind = kind_of_source(name)
    if spec.column_names is not None and kind != "file":
        raise InputError(f"data.column_names: only CSV and TSV files may lack a header, but {key} is {name!r}")
    for field in ("delimiter", "encoding"):
        value = getattr(spec, field)
        if value is not None and kind != "file":
            raise InputError(f"data.{field}: {value!r} applies only to text files, but {key} is {name!r}")
    if kind == "packaged":
        _reject_split_keys(spec, part, f"{key} is the packaged data set {name!r}")
        return PACKAGED[name](part, sentiment)
    if kind == "file":
        check_exists(path, key)
        _reject_split_keys(spec, part, f"{key} '{name}' is a file")
        return read_file(path, key, spec.column_names, spec.delimiter, spec.encoding)
    if kind is None:
        beside = [str(path.parent / entry.name) for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = closest(name, PACKAGED) or closest(name, beside)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(
            f"{key}: {name!r} is no file, directory, packaged data set ({', '.join(PACKAGED)}) or hub name "
            f"(org/name){hint}"
        )
    return _load_published(spec, part, key, name if kind == "hub" else str(path))


def _reject_split_keys(spec: DataSpec, part: Part, reason: str) -> None:
    given: dict[str, str | None] = {}
    if part == "train" and spec.train_split != "train":
        given["train_split"] = spec.train_split
    if part == "train" and spec.eval is None:
        given["config"] = spec.config
    if part == "eval" or spec.eval is None:
        given["eval_split"] = spec.eval_split
    for field, value in given.items():
        if value is not None:
            raise InputError(f"data.{field}: {value!r} applies only to directories and hub data sets, but {reason}")


def _load_published(spec: DataSpec, part: Part, key: str, name: str) -> Dataset:
    """A directory or hub data set through :func:`datasets.load_dataset`; code that comes with a data set never runs."""
    if part == "eval" and spec.eval_split is None:
        raise InputError(f"data.eval_split: is needed when data.eval is a directory or hub data set ({name!r})")
    split = spec.train_split if part == "train" else spec.eval_split

    import pyarrow as pa
    from datasets import Dataset, load_dataset
    from datasets.exceptions import DatasetsError

    try:
        with quiet():
            data = load_dataset(name, spec.config, split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError, pa.ArrowException) as error:
        what = (
            "cannot be read as a data set"
            if Path(name).is_dir()
            else "is no local file and cannot be loaded from the hub"
        )
        deepest = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
        reason = (str(deepest).strip() or type(deepest).__name__).splitlines()[0]
        raise InputError(f"{key}: {name!r} {what} (split {split!r}, config {spec.config!r}): {reason}") from error
    if not isinstance(data, Dataset) or len(data) == 0:
        raise InputError(f"{key}: {name!r} holds no rows in split {split!r}")
    check_unicode(data.data.table, f"{key} {name!r}")
    return data


def _shuffled(total: int, seed: int) -> list[int]:
    import numpy as np

    order: list[int] = np.random.default_rng(seed).permutation(total).tolist()
    return order


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars from ``datasets`` inside the block."""
    import datasets

    were_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            datasets.enable_progress_bars()
