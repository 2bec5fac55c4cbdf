"""LoRMA layers: a frozen base layer taken as a black box, and the multiplier on one side of it.

pre: ``out = I(BA)·(base(x) − bias) + bias``; post: ``out = base(I(BA)·x)``. Neither reads the base weight, so any
layer that computes a linear map will do. Only the update is added, ``out = base(x) + (I(BA) − I)·dropout(y)``: at the
start of training plus adds exact zeros, and in low precision a small update is not rounded into a large weight.

Several active adapters act in the order in which they were activated, the first on W0 first. For post that means the
*last* one meets the input first: W0·M₁·M₂·x.

A and B are kept in at least float32 until PEFT is told otherwise (``autocast_adapter_dtype=False``); the update is
computed in their dtype and the sum returned in the base layer's output dtype.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorma import functional
from lorma.functional.multiplier import Inflation, Side
from lorma.tuners.lorma.config import LormaConfig
from lorma.tuners.merge import SnapshotMerge


class LormaLayer(SnapshotMerge):
    """What every LoRMA layer has, whatever kind of base layer it wraps: factors, scalings, merging.

    Attributes, each keyed by adapter name: ``lorma_A`` (r × n), ``lorma_B`` (n × r), ``r``, ``lorma_alpha``,
    ``scaling``, ``lorma_dropout``, ``inflation``, ``side`` (``"pre"`` or ``"post"``; ``"auto"`` is resolved here).
    """

    adapter_layer_names = ("lorma_A", "lorma_B")
    other_param_names = ("r", "lorma_alpha", "scaling", "lorma_dropout", "inflation", "side")

    def __init__(self, base_layer: nn.Module, layer_name: str) -> None:
        self.base_layer = base_layer
        self.layer_name = layer_name
        self.r: dict[str, int] = {}
        self.lorma_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.inflation: dict[str, Inflation] = {}
        self.side: dict[str, Side] = {}
        self.lorma_dropout = nn.ModuleDict({})
        self.lorma_A = nn.ParameterDict({})
        self.lorma_B = nn.ParameterDict({})
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.in_features, self.out_features = cast(tuple[int, int], _get_in_out_features(self.get_base_layer()))

    def update_layer(self, adapter_name: str, r: int, lorma_alpha: float, config: LormaConfig) -> None:
        """Add an adapter, or replace the one of this name."""
        side = config.side
        if side == "auto":
            side = "pre" if self.out_features <= self.in_features else "post"
        n = self.out_features if side == "pre" else self.in_features
        self.r[adapter_name] = r
        self.lorma_alpha[adapter_name] = lorma_alpha
        self.scaling[adapter_name] = config.scaling(r, lorma_alpha)
        self.inflation[adapter_name] = cast(Inflation, config.inflation)
        self.side[adapter_name] = cast(Side, side)
        dropout = nn.Dropout(config.lorma_dropout) if config.lorma_dropout > 0 else nn.Identity()
        self.lorma_dropout[adapter_name] = dropout
        dtype = self._start_dtype()
        self.lorma_A[adapter_name] = nn.Parameter(torch.empty(r, n, dtype=dtype))
        self.lorma_B[adapter_name] = nn.Parameter(torch.empty(n, r, dtype=dtype))
        self.reset_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def reset_parameters(self, adapter_name: str, init_weights: bool) -> None:
        """Fill A and B with the start of training, or with noise if ``init_weights`` is False."""
        A, B = self.lorma_A[adapter_name], self.lorma_B[adapter_name]
        if A.is_meta:
            return
        if init_weights:
            functional.init_factors(A, B, self.scaling[adapter_name], self.inflation[adapter_name])
        else:
            for factor in (A, B):
                nn.init.kaiming_uniform_(factor, a=5**0.5)

    def _start_dtype(self) -> torch.dtype:
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        known = dtype is not None and dtype.is_floating_point and dtype.itemsize > 1
        return torch.promote_types(dtype, torch.float32) if known else torch.float32

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move one adapter to the base layer's device. Its dtype stays: rounding is not a matter of place."""
        target = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        for factors in (self.lorma_A, self.lorma_B):
            if target is not None and adapter_name in factors and not factors[adapter_name].is_meta:
                factor = factors[adapter_name]
                factors[adapter_name] = nn.Parameter(factor.data.to(target), factor.requires_grad)

    def cast_adapter(self, adapter_name: str, dtype: torch.dtype) -> None:
        """Cast A and B of one adapter to ``dtype``."""
        for factors in (self.lorma_A, self.lorma_B):
            if adapter_name in factors:
                factors[adapter_name].data = factors[adapter_name].data.to(dtype)

    def multiplier_update(self, x: Tensor, adapter_name: str) -> Tensor:
        """``(I(BA) − I)·dropout(x)`` in the dtype of the adapter; ``x`` is (…, n)."""
        A, B = self.lorma_A[adapter_name], self.lorma_B[adapter_name]
        x = self.lorma_dropout[adapter_name](self._cast_input_dtype(x, A.dtype))
        return functional.multiplier_update(x, A, B, self.scaling[adapter_name], self.inflation[adapter_name])

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """``get_delta_weight`` is the additive residual ``I(BA)·W0 − W0``, which PEFT's converter factorises."""
        return True


class Linear(nn.Module, LormaLayer):
    """LoRMA on ``nn.Linear`` and on transformers' ``Conv1D``."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        *,
        layer_name: str,
        r: int,
        lorma_alpha: float,
        config: LormaConfig,
    ) -> None:
        super().__init__()
        LormaLayer.__init__(self, base_layer, layer_name)
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lorma_alpha, config)

    def delta_weight_of(self, adapter_name: str, weight: Tensor) -> Tensor:
        A, B = (t[adapter_name].to(weight.device, weight.dtype) for t in (self.lorma_A, self.lorma_B))
        W = weight.T if self.fan_in_fan_out else weight
        delta = functional.delta_weight(
            W, A, B, self.scaling[adapter_name], self.inflation[adapter_name], self.side[adapter_name]
        )
        return delta.T if self.fan_in_fan_out else delta

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)

        active = [name for name in self.active_adapters if name in self.lorma_A]
        for name in reversed(active):
            if self.side[name] == "post":
                x = (x + self.multiplier_update(x, name)).to(x.dtype)
        result = self.base_layer(x, *args, **kwargs)
        pre = [name for name in active if self.side[name] == "pre"]
        if not pre:
            return result

        bias = self.get_base_layer().bias
        y = result if bias is None else result - bias
        out = result
        for position, name in enumerate(pre):
            update = self.multiplier_update(y, name)
            out = out + update
            if position + 1 < len(pre):
                y = y + update
        return out.to(result.dtype)

    def __repr__(self) -> str:
        return "lorma." + super().__repr__()
