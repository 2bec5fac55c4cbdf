"""Language models: continue a prompt, answer in a chat, or go on in the manner of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from lorma.errors import InputError
from lorma.schema import DataSpec
from lorma.tasks.base import Meta, Prepared, Row, Task, fit_length, reject_fields, set_padding, tokenise
from lorma.tasks.chat import TEMPLATE_COLUMNS, ChatTemplate, encode_chats
from lorma.tasks.table import Rows, load_splits
from lorma.tasks.text_input import cell_text

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import BatchEncoding, PreTrainedTokenizerBase

NO_LOSS = -100


class CausalLM(Task):
    """Causal language modelling on one of three kinds of rows.

    * ``data.prompt`` + ``data.completion``: two text columns, joined as they are. The loss is on the completion and
      the end-of-sequence token after it. Prompt and completion are tokenised apart, as they are in use.
    * ``data.messages``: a column of lists of messages, rendered with all their fields (``tool_calls``, …) and the
      row's columns ``tools``, ``documents`` and ``chat_template_kwargs`` by the tokenizer's chat template. What it
      ignores is refused. The loss is on what the assistant says, its calls and end marks included.
    * ``data.text`` (default ``text``): plain text, closed by an end-of-sequence token. The loss is on every token.

    Rows are cut after ``data.max_length`` tokens. A row with no loss left in it is dropped; ``meta`` counts them as
    ``dropped_train`` and ``dropped_eval``.
    """

    name = "causal-lm"
    peft_task_type = "CAUSAL_LM"
    auto_model = "AutoModelForCausalLM"
    primary_metric = "loss"
    greater_is_better = False
    metrics: ClassVar = {"loss": False}

    def prepare(self, spec: DataSpec, tokenizer: PreTrainedTokenizerBase) -> Prepared:
        """See :meth:`Task.prepare`; ``labels`` holds one token id, or −100, for each of ``input_ids``."""
        from transformers import DataCollatorForSeq2Seq

        allowed = "prompt + completion, messages or text"
        reject_fields(spec, self.name, ("text_pair", "label", "labels"), allowed)
        set_padding(tokenizer)
        tokenizer.padding_side = "right"
        meta = _describe(spec, fit_length(spec, tokenizer))
        splits = load_splits(spec)
        train, held = (_tokenised(rows, meta, tokenizer) for rows in (splits.train, splits.eval))
        meta = {
            **meta,
            "train_rows": len(train),
            "eval_rows": len(held),
            "dropped_train": len(splits.train.numbers) - len(train),
            "dropped_eval": len(splits.eval.numbers) - len(held),
        }
        collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=NO_LOSS)
        return Prepared(train, held, collator, None, self.model_kwargs(meta, tokenizer), meta)

    def model_kwargs(self, meta: Meta, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Nothing: the model is used as published."""
        return {}

    def encode(self, rows: Sequence[Row], meta: Meta, tokenizer: PreTrainedTokenizerBase) -> BatchEncoding:
        """See :meth:`Task.encode`: prompts padded on the left and never cut, ready for ``generate``."""
        set_padding(tokenizer)
        if not rows:
            raise InputError("there are no rows to predict")
        prompts = [_prompt_ids([text], meta, tokenizer)[0] for text in _prompt_texts(rows, meta, tokenizer)]
        return tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")


def _prompt_texts(rows: Sequence[Row], meta: Meta, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the model is to continue: the prompt or text of each row, or its messages up to the assistant's turn."""
    if meta["format"] != "messages":
        return [cell_text(row, meta["prompt"] or meta["text"]) for row in rows]
    template, column = ChatTemplate(tokenizer), meta["messages"]
    place = f"column {column!r} of a row to predict"
    return [template.conversation(row, column, place).prompt() for row in rows]


def _describe(spec: DataSpec, max_length: int) -> Meta:
    chosen = "messages" if spec.messages else "prompt-completion" if spec.prompt else "text"
    return {
        "task": CausalLM.name,
        "format": chosen,
        "text": (spec.text or "text") if chosen == "text" else None,
        "text_pair": None,
        "prompt": spec.prompt,
        "completion": spec.completion,
        "messages": spec.messages,
        "labels": None,
        "max_length": max_length,
    }


def _prompt_ids(texts: list[str], meta: Meta, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokens of the beginnings of sequences: with the special tokens that open a sequence, without those that end it.

    A chat template writes its own special tokens, so none are added to what it made.
    """
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=meta["format"] != "messages", verbose=False)["input_ids"]
    if meta["format"] == "messages":
        return ids
    return [tokens[:-1] if tokens and tokens[-1] == tokenizer.eos_token_id else tokens for tokens in ids]


def _tokenised(rows: Rows, meta: Meta, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    closing = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def pack(ids: list[list[int]], labels: list[list[int]]) -> dict[str, list[list[int]]]:
        length = meta["max_length"]
        cut = [(i[:length], l[:length]) for i, l in zip(ids, labels, strict=True)]
        kept = [(i, l) for i, l in cut if any(label != NO_LOSS for label in l[1:])]
        return {
            "input_ids": [i for i, _ in kept],
            "attention_mask": [[1] * len(i) for i, _ in kept],
            "labels": [l for _, l in kept],
        }

    def pack_texts(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        ids = [tokens + closing for tokens in _prompt_ids(batch["text"], meta, tokenizer)]
        return pack(ids, ids)

    def pack_pairs(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        prompts = _prompt_ids(batch["prompt"], meta, tokenizer)
        answers = [
            tokens + closing
            for tokens in tokenizer(batch["completion"], add_special_tokens=False, verbose=False)["input_ids"]
        ]
        both = list(zip(prompts, answers, strict=True))
        return pack([p + a for p, a in both], [[NO_LOSS] * len(p) + a for p, a in both])

    def pack_chats(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        return pack(*encode_chats(batch["text"], batch["spans"], tokenizer))

    if meta["format"] == "text":
        data = tokenise({"text": rows.text("text", meta["text"])}, pack_texts)
    elif meta["format"] == "prompt-completion":
        columns = {field: rows.text(field, meta[field]) for field in ("prompt", "completion")}
        data = tokenise(columns, pack_pairs)
    else:
        data = tokenise(_rendered(rows, meta["messages"], tokenizer), pack_chats)
    if len(data) == 0:
        raise InputError(
            f"data.max_length: within {meta['max_length']} tokens no row of {rows.source} has anything to learn; "
            "allowed: more than the length of the prompts"
        )
    return data


def _rendered(rows: Rows, column: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Any]]:
    columns = {column: rows.column("messages", column)}
    for name in TEMPLATE_COLUMNS:
        if name in rows.data.column_names and name != column:
            columns[name] = rows.column("messages", name)
    template = ChatTemplate(tokenizer)
    texts, spans = [], []
    for number, cells in zip(rows.numbers, zip(*columns.values(), strict=True), strict=True):
        place = f"data.messages: column {column!r} of {rows.source} row {number}"
        chat = template.conversation(dict(zip(columns, cells, strict=True)), column, place)
        text, own = chat.assistant_spans()
        texts.append(text)
        spans.append(own)
    return {"text": texts, "spans": spans}
