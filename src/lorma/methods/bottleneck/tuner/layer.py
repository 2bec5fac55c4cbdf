"""A bottleneck on what comes out of a linear layer."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorma.methods.bottleneck.tuner.config import BottleneckConfig
from lorma.tuners.factors import Factors
from lorma.tuners.layer import AdapterLayer
from lorma.tuners.updating import UpdatingLayer


class BottleneckLayer(AdapterLayer):
    """Base of all layers with bottlenecks.

    Attributes, each keyed by adapter name: ``bottleneck_down`` (r × d), ``bottleneck_up`` (d × r), their biases
    ``bottleneck_down_bias`` (r) and ``bottleneck_up_bias`` (d), ``bottleneck_dropout``, ``activation`` and ``undo``.
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_down_bias", "bottleneck_up", "bottleneck_up_bias")
    other_param_names = ("bottleneck_dropout", "activation", "undo")

    def __init__(self, base_layer: nn.Module, layer_name: str, **quantization_kwargs: Any) -> None:
        super().__init__(base_layer, layer_name, **quantization_kwargs)
        self.bottleneck_down = Factors()
        self.bottleneck_down_bias = Factors()
        self.bottleneck_up = Factors()
        self.bottleneck_up_bias = Factors()
        self.bottleneck_dropout = nn.ModuleDict({})
        self.activation: dict[str, str] = {}

    def update_layer(self, adapter_name: str, *args: Any, config: BottleneckConfig, r: int, **options: Any) -> None:
        """Add an adapter, or replace the one of this name."""
        d, dtype = self.out_features, self._start_dtype()
        self.undo[adapter_name] = config.undo
        self.activation[adapter_name] = config.activation
        dropout = nn.Dropout(config.bottleneck_dropout) if config.bottleneck_dropout > 0 else nn.Identity()
        self.bottleneck_dropout[adapter_name] = dropout
        for name, shape in zip(self.adapter_layer_names, ((r, d), (r,), (d, r), (d,)), strict=True):
            getattr(self, name)[adapter_name] = nn.Parameter(torch.zeros(shape, dtype=dtype))
        with torch.no_grad():
            nn.init.kaiming_uniform_(self.bottleneck_down[adapter_name], a=5**0.5)
            if not config.init_weights:
                nn.init.kaiming_uniform_(self.bottleneck_up[adapter_name], a=5**0.5)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def _refuse(self) -> NoReturn:
        raise ValueError(
            f"{self.layer_name} carries a bottleneck adapter, which is not linear: it cannot be written as a weight, "
            "so it cannot be merged or exported"
        )

    def check_merge(self, *args: Any, **kwargs: Any) -> None:
        """Refuse every merge (``ValueError``)."""
        self._refuse()

    def merge(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused (``ValueError``)."""
        self._refuse()

    def delta_weight_of(self, adapter_name: str, weight: Tensor) -> Tensor:
        """Refused (``ValueError``)."""
        self._refuse()

    def inverse_delta_weight_of(self, adapter_name: str, weight: Tensor) -> Tensor:
        """Refused (``ValueError``)."""
        self._refuse()

    def singular_range_of(self, adapter_name: str) -> tuple[float, float]:
        """Refused (``ValueError``)."""
        self._refuse()

    def arithmetic_error_of(self, adapter_name: str, norm: float) -> float:
        """Refused (``ValueError``)."""
        self._refuse()

    def lora_form_of(self, adapter_name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Refused (``ValueError``)."""
        self._refuse()


class Linear(UpdatingLayer, BottleneckLayer):
    """A bottleneck after ``nn.Linear``, transformers' ``Conv1D`` and quantised linear layers."""

    def _updated(self, x: Tensor, result: Tensor, name: str) -> Tensor:
        down, down_bias, up, up_bias = (getattr(self, held)[name] for held in self.adapter_layer_names)
        hidden = F.linear(self.bottleneck_dropout[name](result.to(down.dtype)), down, down_bias)
        hidden = F.relu(hidden) if self.activation[name] == "relu" else F.gelu(hidden)
        return result + F.linear(hidden, up, up_bias)
