"""Adapters with random factors, for tests that need one far from the identity."""

import copy

import torch
from peft import get_peft_model

from lorma import LormaConfig

TARGETS = ["up", "gate", "conv"]


def adapted(model, **config):
    """A copy of ``model`` with an adapter whose factors are random, so that it is far from the identity."""
    config.setdefault("target_modules", TARGETS)
    peft_model = get_peft_model(copy.deepcopy(model), LormaConfig(**config)).eval()
    randomise(peft_model)
    return peft_model


def randomise(model, adapter="default", std=0.3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lorma_" in name and name.endswith(f".{adapter}"):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * std
            parameter.data.add_(noise.to(parameter.dtype))
