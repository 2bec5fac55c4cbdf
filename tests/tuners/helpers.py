"""Adapters with random factors, for tests that need one far from the identity."""

import copy

import torch
from peft import PeftModel, get_peft_model

from lorma import LormaConfig, TLoraConfig

TARGETS = ["up", "gate", "conv"]


def adapted(model, **config):
    """A copy of ``model`` with an adapter whose factors are random, so that it is far from the identity."""
    config.setdefault("target_modules", TARGETS)
    peft_model = get_peft_model(copy.deepcopy(model), LormaConfig(**config)).eval()
    randomise(peft_model)
    return peft_model


def is_factor(name):
    """Whether a parameter is one of LoRMA's or TLoRA's."""
    return ".lorma_" in name or ".tlora_" in name


def randomise(model, adapter="default", std=0.3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if is_factor(name) and f".{adapter}." in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * std
            parameter.data.add_(noise.to(parameter.dtype))


def tlora(model, **config):
    """A copy of ``model`` with a TLoRA adapter far from its start."""
    config = {"r": 4, "seed": 7, "target_modules": TARGETS, **config}
    adapted = get_peft_model(copy.deepcopy(model), TLoraConfig(**config)).eval()
    randomise(adapted)
    return adapted


def load(model, folder, **options):
    return PeftModel.from_pretrained(copy.deepcopy(model), folder, **options).eval()
