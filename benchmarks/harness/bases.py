"""The base models that are measured and what they read: real ones on film reviews, and Llama layers of a given size."""

from __future__ import annotations

from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.utils import logging

from benchmarks.harness import DEVICE
from lorma.models.load import load_model, load_tokenizer
from lorma.schema import ModelSpec
from lorma.tasks.movie_reviews import load_movie_reviews

logging.set_verbosity_error()
logging.disable_progress_bar()

ONE_BILLION = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
"""The layers of Llama 3.2 1B."""
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class Base(NamedTuple):
    """A model, the names of the layers to adapt, and one batch as keyword arguments of the model."""

    model: nn.Module
    targets: list[str]
    batch: dict[str, Any]


def minilm(rows: int, length: int) -> Base:
    """all-MiniLM-L6-v2 with a two-class head on the first film reviews, padded to the longest of them."""
    spec = ModelSpec(name="minilm")
    model = load_model(spec, "AutoModelForSequenceClassification", num_labels=2)
    reviews = load_movie_reviews("train", sentiment=True)[:rows]
    options: dict[str, Any] = {"truncation": True, "max_length": length, "padding": True, "return_tensors": "pt"}
    batch = dict(load_tokenizer(spec)(reviews["text"], **options))
    batch["labels"] = torch.tensor([label == "positive" for label in reviews["label"]]).long()
    return _placed(model, ["query", "value"], batch)


def smollm2(rows: int, length: int) -> Base:
    """SmolLM2-135M on film reviews one after the other, cut into rows of one length."""
    spec = ModelSpec(name="smollm2-135m")
    model = load_model(spec, "AutoModelForCausalLM")
    texts = load_movie_reviews("train", sentiment=False)[: rows * length]["text"]
    tokens = load_tokenizer(spec)(texts)["input_ids"]
    ids = torch.tensor(list(chain.from_iterable(tokens))[: rows * length]).view(rows, length)
    return _placed(model, ["q_proj", "v_proj"], {"input_ids": ids, "labels": ids})


def llama(size: dict[str, Any], rows: int, length: int) -> Base:
    """A small-vocabulary Llama with random weights, on random tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=1024, pad_token_id=0, **size))
    ids = torch.randint(1, 1024, (rows, length))
    return _placed(model, ["q_proj", "v_proj"], {"input_ids": ids, "labels": ids})


def _placed(model: Any, targets: list[str], batch: dict[str, Any]) -> Base:
    model.config.use_cache = False
    return Base(model.to(DEVICE), targets, {name: tensor.to(DEVICE) for name, tensor in batch.items()})
