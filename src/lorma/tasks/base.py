"""What every task family gives to training and prediction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lorma.errors import InputError
from lorma.schema import DataSpec
from lorma.tasks.table import quiet

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import BatchEncoding, EvalPrediction, PreTrainedTokenizerBase

DEFAULT_MAX_LENGTH = 256

Meta = dict[str, Any]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class TrivialBaseline:
    """What is reached without reading the texts: the one answer that does best on the evaluation rows.

    Attributes:
        name: what tables call it.
        prediction: the answer.
        metrics: of this answer for every evaluation row, by the names that ``compute_metrics`` gives them.
    """

    name: str
    prediction: str
    metrics: dict[str, float]


@dataclass(frozen=True)
class Prepared:
    """Everything the Trainer needs from a task.

    Attributes:
        train, eval: tokenised rows: ``input_ids``, ``attention_mask``, ``token_type_ids`` where the tokenizer gives
            them, and ``labels`` (an int, a float, or for language models one int a token with −100 for "no loss").
        collator: pads a list of such rows into a batch of tensors.
        compute_metrics: Trainer's metric function, or ``None`` where the evaluation loss is the metric.
        model_kwargs: arguments for ``from_pretrained``.
        meta: JSON-serialisable; kept beside the adapter, it is all that prediction needs to know about the data.
        trivial: what a trained model has to beat, or ``None`` where there is no such answer.
    """

    train: Dataset
    eval: Dataset
    collator: Callable[[list[dict[str, Any]]], Any]
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None
    model_kwargs: dict[str, Any]
    meta: Meta
    trivial: TrivialBaseline | None = None


class Task(ABC):
    """A task family. Stateless: what depends on the data is in :class:`Prepared` and its ``meta``."""

    name: ClassVar[str]
    peft_task_type: ClassVar[str]
    auto_model: ClassVar[str]
    primary_metric: ClassVar[str]
    greater_is_better: ClassVar[bool]
    metrics: ClassVar[dict[str, bool]]
    """What evaluations measure, and whether greater is better."""

    @abstractmethod
    def prepare(self, spec: DataSpec, tokenizer: PreTrainedTokenizerBase) -> Prepared:
        """Load, check and tokenise the data of ``spec``.

        A tokenizer without a padding token gets its end-of-sequence token as one; language models also get
        ``padding_side="right"``. Both change ``tokenizer`` in place.

        Raises:
            InputError: anything about the data that cannot be used, with key, value and row.
        """

    @abstractmethod
    def model_kwargs(self, meta: Meta, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Arguments for the auto model's ``from_pretrained``, the same in training and prediction."""

    @abstractmethod
    def encode(self, rows: Sequence[Row], meta: Meta, tokenizer: PreTrainedTokenizerBase) -> BatchEncoding:
        """A padded batch of PyTorch tensors, each of shape (rows, tokens), ready for the model.

        Raises:
            InputError: a row without a usable text in the columns that ``meta`` names, or no rows.
        """


def set_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that ``tokenizer`` can pad, with its end-of-sequence token when it has no padding token."""
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError("the tokenizer has neither a padding nor an end-of-sequence token, so it cannot batch")
        tokenizer.pad_token = tokenizer.eos_token


def fit_length(spec: DataSpec, tokenizer: PreTrainedTokenizerBase) -> int:
    """``data.max_length``, or when it is left out 256 tokens or the model's own limit, whichever is less.

    Raises:
        InputError: when ``data.max_length`` exceeds what the model's tokenizer allows.
    """
    limit = tokenizer.model_max_length
    if spec.max_length is None:
        return min(DEFAULT_MAX_LENGTH, limit)
    if spec.max_length > limit:
        raise InputError(f"data.max_length: {spec.max_length} exceeds the model's {limit} tokens")
    return spec.max_length


def reject_fields(spec: DataSpec, task: str, fields: Sequence[str], allowed: str) -> None:
    """Raise :class:`InputError` for a column field of ``spec`` that ``task`` does not use."""
    for field in fields:
        value = getattr(spec, field)
        if value is not None:
            raise InputError(f"data.{field}: {value!r} does not apply to the task {task!r}; allowed: {allowed}")


def tokenise(columns: dict[str, list[Any]], function: Callable[[dict[str, list[Any]]], Any]) -> Dataset:
    """``function`` over batches of ``columns``; only the columns it returns, and ``labels``, are kept."""
    from datasets import Dataset

    data = Dataset.from_dict(columns)
    spent = [name for name in columns if name != "labels"]
    with quiet():
        return data.map(function, batched=True, remove_columns=spent, keep_in_memory=True, load_from_cache_file=False)
