"""Trainable parameters against the paper's Tables 2 and 4, on models without memory."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lorma import LormaConfig
from paper_models import GEMMA_2B, LLAMA_3_8B, ROBERTA_BASE, ROBERTA_LARGE

MLP_AND_OUT = ["up_proj", "down_proj", "o_proj", "gate_proj"]


def truncated(count: int, digits: int) -> float:
    """In millions as the paper prints them: cut, not rounded (16.25M appears as 16.2M)."""
    return count * 10**digits // 10**6 / 10**digits


def trainable(model_config: AutoConfig, config) -> int:
    auto = AutoModel if model_config.model_type == "roberta" else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(model_config)
    return sum(p.numel() for p in get_peft_model(model, config).parameters() if p.requires_grad)


@pytest.mark.parametrize("inflation", ["plus", "permutation", "none"])
@pytest.mark.parametrize(("model", "count"), [(ROBERTA_BASE, 294_912), (ROBERTA_LARGE, 786_432)])
def test_roberta(model, count, inflation):
    assert trainable(model, LormaConfig(r=8, inflation=inflation)) == count


def test_gemma_2b():
    targets = ["q_proj", "k_proj", "v_proj", *MLP_AND_OUT]
    count = trainable(GEMMA_2B, LormaConfig(r=4, target_modules=targets))
    assert count == 18 * 2 * 4 * (2048 + 256 + 256 + 2048 + 16384 + 2048 + 16384)
    assert truncated(count, 2) == 5.67


def test_llama_3_8b():
    count = trainable(LLAMA_3_8B, LormaConfig(r=8, target_modules=MLP_AND_OUT))
    assert truncated(count, 2) == 18.87
    auto = trainable(LLAMA_3_8B, LormaConfig(r=8, target_modules=MLP_AND_OUT, side="auto"))
    lora = trainable(LLAMA_3_8B, LoraConfig(r=8, target_modules=MLP_AND_OUT))
    assert round(auto / 1e6, 1) == 8.4
    assert truncated(lora, 1) == 16.2
