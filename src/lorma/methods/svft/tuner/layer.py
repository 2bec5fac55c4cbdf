"""SVFT on linear layers: entries of M, and the singular vectors they act between."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorma.functional import singular
from lorma.functional.multiplier import widen
from lorma.methods.svft.tuner.config import SvftConfig
from lorma.tuners.additive import AdditiveLayer
from lorma.tuners.factors import Factors
from lorma.tuners.updating import UpdatingLayer


class SvftLayer(AdditiveLayer):
    """Base of all SVFT layers.

    Attributes, each keyed by adapter name: ``svft_M`` (the trained entries: the diagonal, then the others),
    ``seed`` (of where the others are), ``svft_dropout`` and ``undo``.
    """

    adapter_layer_names = ("svft_M",)
    other_param_names = ("seed", "svft_dropout", "undo")

    def __init__(self, base_layer: nn.Module, layer_name: str, **quantization_kwargs: Any) -> None:
        super().__init__(base_layer, layer_name, **quantization_kwargs)
        self.svft_M = Factors()
        self.svft_dropout = nn.ModuleDict({})
        self.seed: dict[str, int] = {}
        self._basis: tuple[Any, Tensor, Tensor] | None = None

    def update_layer(self, adapter_name: str, *args: Any, config: SvftConfig, r: int, **options: Any) -> None:
        """Add an adapter, or replace the one of this name."""
        n = min(self.in_features, self.out_features)
        count = singular.off_diagonal_count(n, r) if config.pattern == "random" else 0
        self.undo[adapter_name] = config.undo
        self.seed[adapter_name] = config.seed
        dropout = nn.Dropout(config.svft_dropout) if config.svft_dropout > 0 else nn.Identity()
        self.svft_dropout[adapter_name] = dropout
        entries = torch.zeros(n + count, dtype=self._start_dtype())
        if not config.init_weights:
            nn.init.normal_(entries)
        self.svft_M[adapter_name] = nn.Parameter(entries)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def basis(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """U (d × n) and V (k × n) of the unmerged base weight, computed when first asked for and kept in ``dtype``."""
        parameter = self._parameter()
        key = (id(parameter), parameter._version, parameter.data_ptr())
        held = self._basis
        if held is not None and self.merged:  # whose original weight may be gone
            return held[1].to(parameter.device, dtype), held[2].to(parameter.device, dtype)
        if held is None or held[0] != key or held[1].dtype != dtype:
            with torch.no_grad():
                weight = widen(self.original_weight())
                U, V = singular.singular_basis(weight.T if self.fan_in_fan_out else weight)
            held = self._basis = (key, U.to(dtype), V.to(dtype))
        if held[1].device != parameter.device:
            held = self._basis = (held[0], held[1].to(parameter.device), held[2].to(parameter.device))
        return held[1], held[2]

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the base layer stores its weight as in × out."""
        return isinstance(self.get_base_layer(), Conv1D)

    def _positions(self, adapter_name: str) -> Tensor:
        """Where the trained entries off the diagonal are."""
        entries, n = self.svft_M[adapter_name], min(self.in_features, self.out_features)
        return singular.random_positions(n, len(entries) - n, self.seed[adapter_name]).to(entries.device)

    def delta_weight_of(self, adapter_name: str, weight: Tensor) -> Tensor:
        """ΔW of one adapter. It does not depend on ``weight`` but on the unmerged one, whose basis it is written in."""
        U, V = self.basis(weight.dtype)
        entries = self.svft_M[adapter_name].to(weight.dtype)
        delta = singular.singular_delta(U, V, entries, self._positions(adapter_name))
        return (delta.T if self.fan_in_fan_out else delta).to(weight.device)

    def arithmetic_error_of(self, adapter_name: str, norm: float) -> float:
        """Bound on the error (Frobenius norm) of adding ΔW to a weight of this norm in float64."""
        unit, entries = torch.finfo(torch.float64).eps, self.svft_M[adapter_name].double()
        return unit * (norm + 4 * len(entries) * entries.norm().item())

    def lora_form_of(self, adapter_name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Refused: M has full rank."""
        raise ValueError(f"adapter {adapter_name!r} of {self.layer_name} is no LoRA: SVFT's update has full rank")


class Linear(UpdatingLayer, SvftLayer):
    """SVFT on ``nn.Linear``, transformers' ``Conv1D`` and quantised linear layers, which are dequantised once."""

    def _updated(self, x: Tensor, result: Tensor, name: str) -> Tensor:
        entries = self.svft_M[name]
        U, V = self.basis(entries.dtype)
        x = self.svft_dropout[name](x.to(entries.dtype))
        return result + singular.singular_update(x, U, V, entries, self._positions(name))
