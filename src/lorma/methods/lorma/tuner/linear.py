"""LoRMA on linear layers, whatever holds their weight, and quickly where it is a plain frozen one."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from lorma import kernels
from lorma.functional.multiplier import Side
from lorma.methods.lorma.tuner.channels import ChannelLayer
from lorma.tuners.plain import plain_weight


class Linear(ChannelLayer):
    """LoRMA on ``nn.Linear``, transformers' ``Conv1D`` and every quantised linear layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._folded = kernels.TensorCache()

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the base layer stores its weight as in × out."""
        return isinstance(self.get_base_layer(), Conv1D)

    def _forward_alone(self, x: Tensor, name: str, *args: Any, **kwargs: Any) -> Tensor:
        base = self.base_layer
        weight = None if args or kwargs else plain_weight(base)
        if weight is not None:
            (A, B), side, s, inflation = self._factors(name), self.side[name], self.scaling[name], self.inflation[name]
            transposed = type(base) is Conv1D
            out = kernels.multiplied_linear(
                x, weight, cast(Any, base).bias, A, B, s, inflation, side, transposed=transposed, folded=self._folded
            )
            if out is not None:
                return out
        return super()._forward_alone(x, name, *args, **kwargs)

    def train(self, mode: bool = True) -> Any:
        """As every module's; a folded weight is not kept from training to evaluation."""
        self._folded.clear()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._folded.clear()
        return super()._apply(*args, **kwargs)

    def _set_parameter(self, weight: Tensor) -> None:
        self._folded.clear()
        super()._set_parameter(weight)

    def _matrices(self, weight: Tensor, side: Side) -> Tensor:
        return weight.T if self.fan_in_fan_out else weight

    def _along_rows(self, vector: Tensor, weight: Tensor) -> Tensor:
        return vector if self.fan_in_fan_out else super()._along_rows(vector, weight)
