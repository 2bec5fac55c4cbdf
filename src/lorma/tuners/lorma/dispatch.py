"""Which LoRMA layer wraps which kind of module, and what is refused."""

from __future__ import annotations

import re
import warnings
from typing import Any

from peft.utils.other import get_pattern_key
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from lorma.tuners.lorma.attention import MultiheadAttention
from lorma.tuners.lorma.config import LormaConfig
from lorma.tuners.lorma.convolution import ConvNd
from lorma.tuners.lorma.embedding import Embedding
from lorma.tuners.lorma.fused import FusedProjection
from lorma.tuners.lorma.layer import LormaLayer
from lorma.tuners.lorma.linear import Linear
from lorma.tuners.quantized import quantization_backend

MAMBA_MODEL_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
MAMBA_FUSED_MODULES = ("out_proj", "conv1d")
KINDS: dict[type[nn.Module], type[LormaLayer]] = {
    nn.Linear: Linear,
    Conv1D: Linear,
    nn.Embedding: Embedding,
    nn.Conv1d: ConvNd,
    nn.Conv2d: ConvNd,
    nn.Conv3d: ConvNd,
    nn.MultiheadAttention: MultiheadAttention,
}


def layer_class(target: nn.Module, name: str) -> type[LormaLayer]:
    """The LoRMA layer for a module.

    Raises:
        ValueError: if there is none, with the reason.
    """
    if isinstance(target, NonDynamicallyQuantizableLinear):
        raise ValueError(
            f"Target module {name} is not supported: nn.MultiheadAttention reads this weight without calling the "
            "module; target the attention itself"
        )
    for kind, cls in KINDS.items():
        if isinstance(target, kind):
            if isinstance(target, nn.Embedding) and target.max_norm is not None:
                raise ValueError(
                    f"Target module {name} is not supported: an nn.Embedding with max_norm changes its weight when read"
                )
            return cls
    backend = quantization_backend(target)
    if backend is not None and backend.layer_type == "linear":
        return Linear
    raise ValueError(
        f"Target module {name} ({type(target).__name__}) is not supported. Currently, only the following modules are "
        f"supported: {', '.join(f'`{kind.__module__}.{kind.__name__}`' for kind in KINDS)} and quantised linear layers."
    )


def fused_projection(config: LormaConfig, target: nn.Module, name: str) -> FusedProjection | None:
    """How ``config`` says that this module is fused, if it does.

    Raises:
        ValueError: if the module cannot be cut, or the slices do not add up to its outputs.
    """
    fused = config.fused_projections or {}
    key = get_pattern_key(list(fused), name)
    if key not in fused:
        return None
    cut = FusedProjection.parse(key, fused[key])
    base: Any = target.base_layer if hasattr(target, "base_layer") else target
    if layer_class(base, name) is not Linear:
        raise ValueError(f"fused_projections[{key!r}] matches {name}, a {type(base).__name__}; only linear layers fuse")
    outputs = base.nf if isinstance(base, Conv1D) else base.out_features
    if sum(cut.splits) != outputs:
        raise ValueError(
            f"fused_projections[{key!r}]['splits']={list(cut.splits)} add up to {sum(cut.splits)}, but {name} has "
            f"{outputs} outputs"
        )
    return cut


def rank_and_alpha(config: LormaConfig, name: str) -> tuple[int, float]:
    """Rank and alpha of one module after ``rank_pattern`` and ``alpha_pattern``."""
    r = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name), config.r)
    return r, config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), name), config.lorma_alpha)


def patterns(ranks: dict[str, int], alphas: dict[str, float]) -> dict[str, Any]:
    """Fields of a configuration that give each layer, by its name, a rank and the scaling alpha / rank.

    Where layers differ all are named, the longest name first: a name also matches where another ends in it.
    """
    longest_first = sorted(ranks, key=len, reverse=True)
    return {
        "r": max(ranks.values()),
        "lorma_alpha": max(alphas.values()),
        "use_rslora": False,
        "rank_pattern": {re.escape(n): ranks[n] for n in longest_first} if len(set(ranks.values())) > 1 else {},
        "alpha_pattern": {re.escape(n): alphas[n] for n in longest_first} if len(set(alphas.values())) > 1 else {},
    }


def check_fan_in_fan_out(config: LormaConfig, target: nn.Module, name: str) -> None:
    """Warn where ``fan_in_fan_out`` says what the module is not."""
    if config.fan_in_fan_out and not isinstance(target, Conv1D):
        warnings.warn(
            f"fan_in_fan_out is set to True but {name} is a {type(target).__name__}, which stores its weight as "
            "out x in; it is ignored there.",
            stacklevel=2,
        )


def check_mamba(model: nn.Module, target_name: str) -> None:
    """Refuse what Mamba's fused kernels read without calling (``ValueError``)."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in MAMBA_MODEL_TYPES and target_name in MAMBA_FUSED_MODULES:
        raise ValueError(
            f"[PEFT:LORMA] Module '{target_name}' is incompatible with Mamba-based models "
            f"(model_type='{model_type}'): its weight is read without calling it. "
            "Please remove it from `target_modules`."
        )
