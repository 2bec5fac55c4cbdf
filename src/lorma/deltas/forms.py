"""An adapted layer as a LoRA of scaling 1, in the orientation and under the names that PEFT's LoRA uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorma.deltas.truncation import Truncation, truncate
from lorma.errors import InputError
from lorma.functional.multiplier import widen
from lorma.tuners.attention import AttentionLayer
from lorma.tuners.layer import AdapterLayer
from lorma.tuners.parameter import ParameterLayer

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class LoraForm:
    """ΔW = up·down of one layer.

    Attributes:
        path: of the layer in the base model.
        module: the base layer, for its kind and sizes.
        down: A', r × k; k · positions for a convolution, D for an embedding.
        up: B', d × r; V × r for an embedding.
        error: ‖ΔW − up·down‖ / ‖ΔW‖ where the form is truncated; None where it is exact.
        change: ‖ΔW‖ / ‖W0‖ where the form is truncated.
    """

    path: str
    module: nn.Module
    down: Tensor
    up: Tensor
    error: float | None = None
    change: float | None = None

    @property
    def rank(self) -> int:
        """r."""
        return len(self.down)

    def padded(self, rank: int) -> LoraForm:
        """The same update in a higher rank: rows and columns of zeros."""
        extra = rank - self.rank
        down = torch.cat([self.down, self.down.new_zeros(extra, self.down.shape[1])])
        up = torch.cat([self.up, self.up.new_zeros(len(self.up), extra)], dim=1)
        return LoraForm(self.path, self.module, down, up, self.error, self.change)

    def named(self) -> dict[str, Tensor]:
        """The two tensors by their names in PEFT's LoRA, relative to the layer."""
        if isinstance(self.module, nn.Embedding):
            return {"lora_embedding_A": self.up.mT, "lora_embedding_B": self.down.mT}
        down, up = self.down, self.up
        if isinstance(self.module, CONVOLUTIONS):
            kernel = self.module.kernel_size
            down = down.reshape(len(down), -1, *kernel)
            up = up.reshape(*up.shape, *(1 for _ in kernel))
        return {"lora_A.weight": down, "lora_B.weight": up}


def lora_form(
    path: str, layer: AdapterLayer, adapter_name: str, weight: Tensor, keep: Truncation | None = None
) -> LoraForm:
    """One adapted layer as a LoRA.

    Args:
        path: of the layer in the base model, for messages.
        layer: the layer.
        adapter_name: which of its adapters.
        weight: the base weight as the layer stores it, in any floating-point precision.
        keep: what to do where there is no exact form: None refuses.

    Raises:
        InputError: PEFT's LoRA has no layer of this kind, or there is no exact form and ``keep`` is None.
    """
    module = layer.get_base_layer()
    _check_kind(path, layer, module)
    weight = widen(weight.detach())
    try:
        down, up = layer.lora_form_of(adapter_name, weight)
        return LoraForm(path, module, down.detach(), up.detach())
    except ValueError as error:
        linear = layer.supports_lora_conversion(adapter_name)
        if keep is None or not linear:
            ways = "; --truncate-rank or --truncate-energy approximates it, lorma merge keeps it exactly"
            raise InputError(f"{path} cannot be exported as a LoRA: {error}{ways if linear else ''}") from None
    delta = _matrix(module, layer.get_delta_weight(adapter_name).detach())
    up, down = truncate(delta, keep)
    norm = delta.norm().item()
    error_norm = (delta - up @ down).norm().item()
    return LoraForm(path, module, down, up, error_norm / norm if norm else 0.0, norm / weight.norm().item())


def _matrix(module: nn.Module, delta: Tensor) -> Tensor:
    """An update in a layer's own layout as d × k."""
    if isinstance(module, CONVOLUTIONS):
        return delta.flatten(1)
    return delta.mT if isinstance(module, Conv1D) else delta


def _check_kind(path: str, layer: AdapterLayer, module: Any) -> None:
    reason = None
    if isinstance(layer, AttentionLayer):
        reason = "PEFT's LoRA adapts nn.MultiheadAttention only together with its output projection"
    elif isinstance(layer, ParameterLayer):
        reason = f"it adapts a bare parameter ({layer.weight_name})"
    elif isinstance(module, CONVOLUTIONS):
        plain = module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"
        reason = None if plain else "PEFT's LoRA knows no convolution with groups, dilation or other padding than zeros"
    if reason:
        raise InputError(f"{path} cannot be exported as a LoRA: {reason}")
