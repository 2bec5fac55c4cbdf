"""Which LoRMA layer wraps which kind of module, and what its adapter is told."""

from __future__ import annotations

from typing import Any

from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorma.methods.lorma.tuner.attention import MultiheadAttention
from lorma.methods.lorma.tuner.config import LormaConfig
from lorma.methods.lorma.tuner.convolution import ConvNd
from lorma.methods.lorma.tuner.embedding import Embedding
from lorma.methods.lorma.tuner.fused import FusedProjection
from lorma.methods.lorma.tuner.linear import Linear
from lorma.tuners.kinds import Kinds, from_pattern, layer_class, patterns

KINDS: Kinds = {
    nn.Linear: Linear,
    Conv1D: Linear,
    nn.Embedding: Embedding,
    nn.Conv1d: ConvNd,
    nn.Conv2d: ConvNd,
    nn.Conv3d: ConvNd,
    nn.MultiheadAttention: MultiheadAttention,
}


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
    if layer_class(KINDS, base, name) is not Linear:
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
    r = from_pattern(config.rank_pattern, name, config.r)
    return r, from_pattern(config.alpha_pattern, name, config.lorma_alpha)


def by_layer(ranks: dict[str, int], alphas: dict[str, float]) -> dict[str, Any]:
    """Fields of a configuration that give each layer, by its name, a rank and the scaling alpha / rank."""
    return {
        "r": max(ranks.values()),
        "lorma_alpha": max(alphas.values()),
        "use_rslora": False,
        **patterns("rank_pattern", ranks),
        **patterns("alpha_pattern", alphas),
    }
