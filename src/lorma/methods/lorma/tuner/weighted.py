"""One adapter out of several: the exact product, or a linear combination of the same rank."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

from lorma import functional
from lorma.adapters.validation import check_choice
from lorma.methods.lorma.tuner.dispatch import by_layer
from lorma.methods.lorma.tuner.layer import LormaLayer
from lorma.methods.lorma.tuner.parameter import ParamWrapper

COMBINATIONS = ("compose", "linear")


def check_combination(
    model: nn.Module, peft_config: dict[str, Any], adapters: list[str], weights: list[float], how: str
) -> None:
    """Refuse what cannot be combined, before anything is changed.

    Raises:
        ValueError: naming the adapter and what is allowed.
    """
    check_choice("combination_type", how, COMBINATIONS)
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"adapters={adapters} and weights={weights} must be lists of the same length, not empty")
    for weight in weights:
        if isinstance(weight, (bool, str)) or not hasattr(weight, "__float__") or not math.isfinite(float(weight)):
            raise ValueError(f"weights={weights} must be finite numbers; found {weight!r}")
    for name in adapters:
        if name not in peft_config:
            raise ValueError(f"Adapter {name} does not exist")
    first = peft_config[adapters[0]]
    wrappers = {path: m for path, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    twice = [path for path, m in wrappers.items() if sum(name in m.modules_to_save for name in adapters) > 1]
    if twice:
        raise ValueError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{len(twice)} such instance(s). Named by more than one adapter: {', '.join(twice)}."
        )
    tokens = [name for name in adapters if peft_config[name].trainable_token_indices is not None]
    if tokens:
        raise ValueError(
            f"adapter {tokens[0]!r} has trained tokens (trainable_token_indices), which take the place of rows of an "
            "embedding and cannot be weighted"
        )
    for name in adapters:
        config = peft_config[name]
        if config.inflation != "plus":
            raise ValueError(
                f"adapter {name!r} has inflation={config.inflation!r}; only plus is closed under products of low rank"
            )
        if config.use_dora:
            raise ValueError(f"adapter {name!r} has use_dora=True, which is no product of low rank")
        for key in ("side", "fused_projections", "target_parameters", "ensure_weight_tying"):
            if getattr(config, key) != getattr(first, key):
                raise ValueError(
                    f"adapters {adapters[0]!r} and {name!r} differ in {key} ({getattr(first, key)!r} and "
                    f"{getattr(config, key)!r}); only adapters on the same matrices and side can be combined"
                )


def combined_config(peft_config: dict[str, Any], adapters: list[str], layers: list[LormaLayer], how: str) -> Any:
    """The configuration of the new adapter: exactly these layers, rank by layer, scaling 1."""
    ranks = {layer.pattern_name: combined_rank(layer, adapters, how) for layer in layers}
    modules = sorted({layer.pattern_name for layer in layers if not isinstance(layer, ParamWrapper)})
    return layerwise_config(peft_config[adapters[0]], modules, ranks)


def layerwise_config(config: Any, modules: Iterable[str], ranks: dict[str, int]) -> Any:
    """``config`` for exactly these layers, each with its own rank (by the name that patterns know) and scaling 1."""
    return replace(
        config,
        target_modules="|".join(re.escape(name) for name in sorted(modules)) or [],
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        **by_layer(ranks, {name: float(rank) for name, rank in ranks.items()}),
    )


def combined_rank(layer: LormaLayer, adapters: list[str], how: str) -> int:
    """Rank of the combination on one layer, 0 if none of the adapters is there.

    Raises:
        ValueError: if a linear combination is asked of different ranks.
    """
    ranks = [layer.r[name] for name in adapters if name in layer.r]
    if how == "linear" and len(set(ranks)) > 1:
        raise ValueError(f"combination_type='linear' needs one rank; on {layer.layer_name} the adapters have {ranks}")
    return (sum(ranks) if how == "compose" else max(ranks)) if ranks else 0


@torch.no_grad()
def fill(layer: LormaLayer, target: str, adapters: list[str], weights: list[float], how: str) -> None:
    """Set A and B of the adapter ``target`` to the combination.

    ``compose``: the product ``∏(I + wᵢsᵢ·BᵢAᵢ)``, the first adapter acting on W0 first; exact, of rank Σrᵢ.
    ``linear``: ``B = Σ sign(wᵢ)√|wᵢsᵢ|·Bᵢ``, ``A = Σ √|wᵢsᵢ|·Aᵢ``; of the same rank, and only near the product.
    """
    present = [(name, w * layer.scaling[name]) for name, w in zip(adapters, weights, strict=True) if name in layer.r]
    new = layer._parts(target)
    for index, (_, A, B) in enumerate(new):
        parts = [(*layer._parts(name)[index][1:], s) for name, s in present]
        if how == "compose":
            factors = functional.compose_all(parts, layer.side[target])
            A.copy_(factors[0])
            B.copy_(factors[1])
        else:
            roots = [abs(float(s)) ** 0.5 for *_, s in parts]
            A.copy_(torch.stack([root * a for root, (a, *_) in zip(roots, parts, strict=True)]).sum(0))
            signed = [root if s >= 0 else -root for root, (*_, s) in zip(roots, parts, strict=True)]
            B.copy_(torch.stack([root * b for root, (_, b, _) in zip(signed, parts, strict=True)]).sum(0))
