"""The input side that classification and regression share: one text or a pair of texts a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lorma.errors import InputError
from lorma.schema import DataSpec, shared_column
from lorma.tasks.base import (
    Meta,
    Prepared,
    Row,
    Task,
    TrivialBaseline,
    fit_length,
    reject_fields,
    set_padding,
    tokenise,
)
from lorma.tasks.table import Rows

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import BatchEncoding, PreTrainedTokenizerBase

DEFAULT_TEXT = "text"


class TextTask(Task):
    """A label for a text or a pair of texts."""

    peft_task_type = "SEQ_CLS"
    auto_model = "AutoModelForSequenceClassification"

    def encode(self, rows: Sequence[Row], meta: Meta, tokenizer: PreTrainedTokenizerBase) -> BatchEncoding:
        """As :meth:`Task.encode`, cut to ``meta["max_length"]`` tokens as in training."""
        set_padding(tokenizer)
        texts = [cell_text(row, meta["text"]) for row in rows]
        pairs = [cell_text(row, meta["text_pair"]) for row in rows] if meta["text_pair"] else None
        if not texts:
            raise InputError("there are no rows to predict")
        return tokenizer(
            texts, pairs, truncation=True, max_length=meta["max_length"], padding=True, return_tensors="pt"
        )

    def _fitted(self, spec: DataSpec, label: str, tokenizer: PreTrainedTokenizerBase) -> DataSpec:
        """``spec`` with its ``max_length`` settled, after checking it against this task and ``tokenizer``; ``label``
        is the column that holds the answers.
        """
        reject_fields(spec, self.name, ("prompt", "completion", "messages"), "text, text_pair, label")
        columns = {"text": spec.text or DEFAULT_TEXT, "text_pair": spec.text_pair, "label": label}
        if fault := shared_column(columns):
            raise InputError(f"data: {fault}")
        set_padding(tokenizer)
        return spec.model_copy(update={"max_length": fit_length(spec, tokenizer)})

    def _meta(self, spec: DataSpec, label: str, labels: list[str] | None) -> Meta:
        return {
            "task": self.name,
            "format": "text",
            "text": spec.text or DEFAULT_TEXT,
            "text_pair": spec.text_pair,
            "label": label,
            "labels": labels,
            "max_length": spec.max_length,
        }

    def _tokenised(self, rows: Rows, labels: list[Any], meta: Meta, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        columns: dict[str, list[Any]] = {"first": rows.text("text", meta["text"])}
        if meta["text_pair"]:
            columns["second"] = rows.text("text_pair", meta["text_pair"])
        columns["labels"] = labels
        length = meta["max_length"]
        return tokenise(
            columns,
            lambda batch: tokenizer(batch["first"], batch.get("second"), truncation=True, max_length=length),
        )

    def _prepared(
        self,
        train: Dataset,
        held: Dataset,
        meta: Meta,
        tokenizer: PreTrainedTokenizerBase,
        metrics: Any,
        trivial: TrivialBaseline,
    ) -> Prepared:
        from transformers import DataCollatorWithPadding

        meta = {**meta, "train_rows": len(train), "eval_rows": len(held)}
        collator = DataCollatorWithPadding(tokenizer)
        return Prepared(train, held, collator, metrics, self.model_kwargs(meta, tokenizer), meta, trivial)


def cell_text(row: Row, column: str) -> str:
    """The text in ``column`` of a row to predict; :class:`InputError` when it is absent, blank or no text."""
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"column {column!r} of a row to predict is {value!r}; allowed: text that is not blank")
    return value
