"""Changing adapters while they train: the end of a cycle, and the optimizer's memory of it.

Works on our layers and on PEFT's LoRA. A *chain* is a second adapter of each layer, frozen, that holds the product (for
LoRA the sum) of the cycles that are over; the trained one acts after it. It is one adapter of rank cycles·r, exactly
(:func:`lorma.functional.compose_all`), and the base weight is never touched, so it may be quantised.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

CHAIN = "chain"
DEFAULT = "default"


class Pair(NamedTuple):
    """The factors A (r × …) and B (… × r) of one adapted layer."""

    path: str
    A: nn.Parameter
    B: nn.Parameter


def adapted_layers(model: nn.Module, adapter: str = DEFAULT) -> list[tuple[str, Any]]:
    """The layers that have this adapter, each with its path in ``model``."""
    return [
        (path, layer)
        for path, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer) and any(adapter in getattr(layer, n) for n in layer.adapter_layer_names)
    ]


def adapter_pairs(model: nn.Module, adapter: str = DEFAULT) -> list[Pair]:
    """A and B of every layer of any tuner that has factors called ``…_A`` and ``…_B``."""
    pairs = []
    for path, layer in adapted_layers(model, adapter):
        for name in layer.adapter_layer_names:
            other = f"{name.removesuffix('A')}B"
            if name.endswith("_A") and adapter in getattr(layer, name) and adapter in getattr(layer, other, ()):
                pairs.append(Pair(path, *(_parameter(getattr(layer, n)[adapter]) for n in (name, other))))
    return pairs


def _parameter(factor: Any) -> nn.Parameter:
    return cast(nn.Parameter, factor if isinstance(factor, Tensor) else factor.weight)


def has_chain_form(layer: Any) -> bool:
    """Whether finished cycles of a layer can be one adapter beside the trained one."""
    if isinstance(layer, LoraLayer):
        return DEFAULT in layer.lora_A and isinstance(layer.lora_A[DEFAULT], nn.Linear)
    return hasattr(layer, "joined")


def restart(model: nn.Module, adapter: str = DEFAULT, seed: int = 0) -> None:
    """Set the factors of an adapter to a start of training, drawn from ``seed`` alone; the parameters stay the same."""
    layers = adapted_layers(model, adapter)
    placed = {factor.device for _, layer in layers for factor in _pair(layer, adapter)}
    with torch.random.fork_rng(devices=[device for device in placed if device.type == "cuda"]):
        torch.manual_seed(seed)
        for _, layer in layers:
            if isinstance(layer, LoraLayer):
                layer.reset_lora_parameters(adapter, True)
            else:
                layer.reset_parameters(adapter, True)


def prune_moments(optimizer: Any, parameters: Iterable[nn.Parameter], share: float) -> None:
    """Set the smallest ``share`` of each parameter's moments to zero (by magnitude); the step counter stays."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    for parameter in parameters:
        for moment in optimizer.state.get(parameter, {}).values():
            if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                dropped = round(share * moment.numel())
                moment.view(-1)[moment.abs().flatten().argsort()[:dropped]] = 0


@torch.no_grad()
def extend_chain(model: Any, adapter: str = DEFAULT) -> None:
    """Put what an adapter does now behind the chain. The adapter goes on unchanged: see :func:`restart`."""
    for _, layer in adapted_layers(model, adapter):
        _join(model, layer, adapter, CHAIN)
        _activate(layer, adapter)


@torch.no_grad()
def close_chain(model: Any, adapter: str = DEFAULT) -> None:
    """Make the adapter what chain and adapter are together, an ordinary adapter of their rank; the chain is gone."""
    layers = adapted_layers(model, adapter)
    if not any(CHAIN in _factors(layer) for _, layer in layers):
        return
    for _, layer in layers:
        _join(model, layer, adapter, adapter)
        layer.delete_adapter(CHAIN)
        layer.set_adapter([adapter])
    ranks = {layer.r[adapter] for _, layer in layers}
    if len(ranks) > 1:
        raise ValueError(f"a chain needs one rank for all layers; found {sorted(ranks)}")
    config, r = model.peft_config[adapter], ranks.pop()
    config.r = r
    setattr(config, _alpha(config), r)
    config.use_rslora = False


@torch.no_grad()
def chain_tensors(model: Any) -> dict[str, Tensor]:
    """The factors of the chain by the paths of their layers."""
    found: dict[str, Tensor] = {}
    for pair in adapter_pairs(model, CHAIN):
        found |= {f"{pair.path}.A": pair.A.detach(), f"{pair.path}.B": pair.B.detach()}
    return found


@torch.no_grad()
def load_chain(model: Any, tensors: dict[str, Tensor], adapter: str = DEFAULT) -> None:
    """Make the chain that :func:`chain_tensors` has described, in the place of one that is there."""
    for path, layer in adapted_layers(model, adapter):
        if CHAIN in _factors(layer):
            layer.delete_adapter(CHAIN)
            layer.set_adapter([adapter])
        if f"{path}.A" in tensors:
            A, B = tensors[f"{path}.A"], tensors[f"{path}.B"]
            _add(model, layer, adapter, CHAIN, len(A))
            for factor, value in zip(_pair(layer, CHAIN), (A, B), strict=True):
                factor.copy_(value)
            _activate(layer, adapter)


@torch.no_grad()
def fold(model: Any, adapter: str = DEFAULT) -> None:
    """Put an adapter's update into the base weights for good; the adapter goes on unchanged: see :func:`restart`."""
    for _, layer in adapted_layers(model, adapter):
        weight = layer.get_base_layer().weight
        weight.data += layer.get_delta_weight(adapter).to(weight.dtype)


def _factors(layer: Any) -> Any:
    return getattr(layer, next(name for name in layer.adapter_layer_names if name.endswith("_A")))


def _pair(layer: Any, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    name = next(n for n in layer.adapter_layer_names if n.endswith("_A") and adapter in getattr(layer, n))
    A, B = (_parameter(getattr(layer, n)[adapter]) for n in (name, f"{name[:-1]}B"))
    return A, B


def _alpha(config: Any) -> str:
    return next(name for name in ("lorma_alpha", "lora_alpha") if hasattr(config, name))


def _add(model: Any, layer: Any, adapter: str, target: str, r: int) -> None:
    """Give a layer an adapter like ``adapter``, of rank r and scaling 1; no random number is used up for its start."""
    config = replace(model.peft_config[adapter], use_rslora=False)
    if target == CHAIN:  # which stands for a weight, and is not dropped
        config = replace(config, **{_alpha(config).replace("alpha", "dropout"): 0.0})
    dtype = _pair(layer, adapter)[0].dtype
    with torch.random.fork_rng(devices=[]):
        layer.update_layer(target, config=config, r=r, **{_alpha(config): r})
    for factor in _pair(layer, target):  # PEFT's LoRA gives them the dtype of the base weight
        factor.data = factor.data.to(dtype)


def _join(model: Any, layer: Any, adapter: str, target: str) -> None:
    """Make ``target`` the product of the chain, if there is one, and the adapter."""
    names = [name for name in (CHAIN, adapter) if name in _factors(layer)]
    if isinstance(layer, LoraLayer):
        A = torch.cat([_parameter(layer.lora_A[name]) for name in names])
        B = torch.cat([layer.scaling[name] * _parameter(layer.lora_B[name]) for name in names], dim=1)
    else:
        A, B = layer.joined(names)
    _add(model, layer, adapter, target, len(A))
    for factor, value in zip(_pair(layer, target), (A, B), strict=True):
        factor.copy_(value)


def _activate(layer: Any, adapter: str) -> None:
    layer.set_adapter([CHAIN, adapter])
    for factor in _pair(layer, CHAIN):
        factor.requires_grad_(False)
