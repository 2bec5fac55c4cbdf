"""Exchanging the weights of a loaded adapter in place, without a ``torch.compile``\\ d model compiling again.

PEFT's own ``hotswap_adapter`` knows LoRA only. This one keeps every tensor that a compiled graph has seen: A and B are
overwritten where they lie, smaller ranks are filled up with zeros (which leaves plus and permutation unchanged, as the
added products are zero), and scalings become tensors, so that another alpha is no reason to compile either.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import load_peft_weights
from torch import Tensor, nn

from lorma.adapters.folder import check_adapter_folder
from lorma.adapters.validation import check_rank
from lorma.methods.lorma.tuner.config import LormaConfig
from lorma.methods.lorma.tuner.dispatch import by_layer, rank_and_alpha
from lorma.methods.lorma.tuner.layer import LormaLayer
from lorma.tuners.names import PREFIX, unwrapped

SAME = ("inflation", "side", "use_dora", "fused_projections", "target_parameters", "lorma_dropout")


def prepare_for_hotswap(model: nn.Module, target_rank: int | None = None) -> None:
    """Make the adapters of a model exchangeable under ``torch.compile``. Call it before compiling.

    Args:
        model: a ``PeftModel`` (or any model) with LoRMA adapters.
        target_rank: pad every A and B to this rank, the largest of the adapters that will be swapped in. None leaves
            ranks as they are.

    Raises:
        ValueError: if the model is compiled already, has no LoRMA layer, or an adapter has a higher rank.
    """
    if hasattr(model, "_orig_mod") or any(getattr(m, "_compiled_call_impl", None) for m in model.modules()):
        raise ValueError("call prepare_for_hotswap before torch.compile, not after")
    layers: list[LormaLayer] = [module for module in model.modules() if isinstance(module, LormaLayer)]
    if not layers:
        raise ValueError("the model has no LoRMA layers; load the first adapter before prepare_for_hotswap")
    if target_rank is not None:
        check_rank("target_rank", target_rank)
        for layer in layers:
            for name, r in layer.r.items():
                if r > target_rank:
                    raise ValueError(
                        f"target_rank={target_rank} is below the rank {r} of {name!r} on {layer.layer_name}"
                    )
    for layer in layers:
        for name in list(layer.lorma_A):
            A, B = layer.lorma_A[name], layer.lorma_B[name]
            layer.scaling[name] = torch.tensor(float(layer.scaling[name]), dtype=A.dtype, device=A.device)
            if target_rank is not None:
                layer.lorma_A[name] = nn.Parameter(_padded(A.data, (target_rank, A.shape[1])), A.requires_grad)
                layer.lorma_B[name] = nn.Parameter(_padded(B.data, (B.shape[0], target_rank)), B.requires_grad)
                layer.r[name] = target_rank
    for name in {name for layer in layers for name in layer.lorma_A}:
        _note_ranks(model, name, layers)


def hotswap_adapter(model: nn.Module, path: str | Path, adapter_name: str = "default", **kwargs: Any) -> None:
    """Replace the weights of a loaded adapter by those of another adapter folder, in place.

    Everything is checked before the first tensor is overwritten.

    Args:
        model: a ``PeftModel``, compiled or not.
        path: folder or hub repository of the adapter to swap in.
        adapter_name: the adapter to overwrite; it keeps its name.
        **kwargs: handed to PEFT for finding the files (``subfolder``, ``revision``, ``token`` …).

    Raises:
        ValueError: if the folder holds no LoRMA adapter or one that does not fit: another inflation or side, other
            layers, a higher rank than there is room for; or if the adapter is merged.
    """
    inner: Any = getattr(model, "_orig_mod", model)
    config = PeftConfig.from_pretrained(str(path), **kwargs)
    if not isinstance(config, LormaConfig):
        raise ValueError(f"{path} holds a {config.peft_type} adapter; only LoRMA adapters can be swapped in here")
    check_adapter_folder(Path(path, kwargs.get("subfolder") or ""), LormaConfig.weight_names)
    if adapter_name not in inner.peft_config:
        raise ValueError(f"Adapter {adapter_name} does not exist; there are {', '.join(inner.peft_config)}")
    for key in SAME:
        ours, theirs = getattr(inner.peft_config[adapter_name], key), getattr(config, key)
        if (ours or None) != (theirs or None):
            raise ValueError(
                f"adapters with different {key} cannot be swapped: {ours!r} is loaded, {path} has {theirs!r}"
            )
    weights = load_peft_weights(str(path), device="cpu", **kwargs)
    state = {unwrapped(name).removeprefix(PREFIX): tensor for name, tensor in weights.items()}
    swaps: list[tuple[Tensor, Tensor]] = []
    layers = []
    for name, layer in inner.named_modules():
        if not isinstance(layer, LormaLayer) or adapter_name not in layer.lorma_A:
            continue
        if adapter_name in layer.merged_adapters:
            raise ValueError(f"adapter {adapter_name!r} is merged; call unmerge_adapter before swapping")
        layers.append(layer)
        for held in layer.adapter_layer_names:
            if adapter_name in getattr(layer, held):
                swaps.append(
                    _fitting(
                        f"{unwrapped(name).removeprefix(PREFIX)}.{held}", getattr(layer, held)[adapter_name], state
                    )
                )
    if state:
        raise ValueError(f"{path} holds {next(iter(state))}, which the loaded adapter does not have")
    with torch.no_grad():
        for old, new in swaps:
            old.copy_(new)
    for layer in layers:
        r, alpha = rank_and_alpha(config, layer.pattern_name)
        layer.set_scaling(adapter_name, config.scaling(r, alpha))
    _note_ranks(inner, adapter_name, layers)


def _note_ranks(model: Any, adapter_name: str, layers: list[LormaLayer]) -> None:
    """Make the configuration say the ranks and scalings that the layers have, so that the adapter can be saved."""
    configs = getattr(model, "peft_config", {})
    if adapter_name in configs:
        mine = [layer for layer in layers if adapter_name in layer.lorma_A]
        ranks = {layer.pattern_name: layer.r[adapter_name] for layer in mine}
        alphas = {layer.pattern_name: float(layer.scaling[adapter_name]) * layer.r[adapter_name] for layer in mine}
        vars(configs[adapter_name]).update(by_layer(ranks, alphas))


def _fitting(key: str, old: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    if key not in state:
        raise ValueError(f"the adapter to swap in lacks {key}")
    new = state.pop(key)
    if new.ndim != old.ndim or any(n > o for n, o in zip(new.shape, old.shape, strict=True)):
        raise ValueError(
            f"{key} has shape {tuple(new.shape)}, but there is room for {tuple(old.shape)}; call prepare_for_hotswap "
            "with the highest rank before compiling"
        )
    rank_dim = 0 if key.endswith("lorma_A") else 1
    if any(
        n != o for dim, (n, o) in enumerate(zip(new.shape, old.shape, strict=True)) if dim != rank_dim or new.ndim < 2
    ):
        raise ValueError(f"{key} has shape {tuple(new.shape)}, which does not fit {tuple(old.shape)}")
    return old, _padded(new.to(old), tuple(old.shape))


def _padded(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    padded = tensor.new_zeros(shape)
    padded[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return padded
