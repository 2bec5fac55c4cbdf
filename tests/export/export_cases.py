"""Adapters with noise in every factor on tiny models, for the tests of export."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from peft import PeftModel, get_peft_model

from lorma import LormaConfig, TLoraConfig


def filled(model: Any, config: Any, seed: int = 1) -> Any:
    """A PeftModel on a copy of ``model`` whose trained parameters are all away from their start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return adapted.eval()


def loaded(model: Any, folder: Any) -> Any:
    """A copy of ``model`` with the adapter of a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()


@torch.no_grad()
def logits(model: Any, inputs: Any) -> torch.Tensor:
    """What the model says of a batch."""
    result: torch.Tensor = model(**inputs).logits
    return result


def assert_same(actual: torch.Tensor, expected: torch.Tensor, base: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal to ``tolerance`` of the largest logit, and visibly different from the base model's."""
    size = expected.abs().max()
    assert (expected - base).abs().max() > 100 * tolerance * size
    assert (actual - expected).abs().max() <= tolerance * size


FUSED = {"c_attn": {"splits": [32, 32, 32], "adapt": [0, 2]}}
EXACT: dict[str, tuple[str, Any]] = {
    "pre": ("bert", lambda: LormaConfig(task_type="SEQ_CLS", target_modules=["query", "value"])),
    "post": ("bert", lambda: LormaConfig(task_type="SEQ_CLS", side="post", target_modules=["query", "dense"])),
    "auto": ("bert", lambda: LormaConfig(task_type="SEQ_CLS", side="auto", target_modules="all-linear")),
    "biases": ("bert", lambda: LormaConfig(task_type="SEQ_CLS", target_modules=["query"], bias="lorma_only")),
    "all-biases": ("bert", lambda: LormaConfig(task_type="SEQ_CLS", target_modules=["query"], bias="all")),
    "embedding": (
        "bert",
        lambda: LormaConfig(target_modules=["word_embeddings", "key"], modules_to_save=["classifier"]),
    ),
    "ranks": (
        "llama",
        lambda: LormaConfig(
            r=4,
            use_rslora=True,
            target_modules=["q_proj", "v_proj", "down_proj"],
            rank_pattern={"q_proj": 2, "layers.1.self_attn.v_proj": 3},
            alpha_pattern={"down_proj": 5.0},
        ),
    ),
    "one-layer": (
        "llama",
        lambda: LormaConfig(task_type="CAUSAL_LM", target_modules=["k_proj"], layers_to_transform=[1], side="auto"),
    ),
    "tied": ("llama", lambda: LormaConfig(target_modules=["lm_head", "gate_proj"])),
    "fused-pre": ("gpt2", lambda: LormaConfig(r=3, target_modules=["c_attn"], fused_projections=FUSED)),
    "fused-post": (
        "gpt2",
        lambda: LormaConfig(r=3, side="post", target_modules=["c_attn", "c_fc"], fused_projections=FUSED),
    ),
    "convolution": ("vit", lambda: LormaConfig(r=2, target_modules=["projection", "q_proj"])),
    "tlora": ("bert", lambda: TLoraConfig(r=4, task_type="SEQ_CLS", target_modules=["query", "value"])),
    "tlora-conv1d": ("gpt2", lambda: TLoraConfig(r=4, target_modules=["c_attn", "c_proj"])),
}
"""Adapters that are exactly a LoRA: the model they belong on and their configuration."""
