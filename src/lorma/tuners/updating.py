"""Layers that leave the call of the base layer alone and change what comes out of it, one adapter after the other."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from lorma.tuners.calling import CallingLayer


class UpdatingLayer(CallingLayer):
    """The forward pass in terms of one function of the layer's input and output."""

    @abstractmethod
    def _updated(self, x: Tensor, result: Tensor, name: str) -> Tensor:
        """The layer's output with one more adapter, from its input and its output so far; in any dtype."""

    def _is_plain(self, name: str, x: Tensor) -> bool:
        return False

    def _forward_alone(self, x: Tensor, name: str, *args: Any, **kwargs: Any) -> Tensor:
        return self._forward_several(x, [name], *args, **kwargs)

    def _forward_several(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for name in names:
            result = self._updated(x, result, name)
        return result.to(dtype)

    def _forward_mixed(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.base_layer(x, *args, **kwargs)
        for name in dict.fromkeys(name for name in adapter_names if name in self.undo):
            rows = torch.tensor([row for row, other in enumerate(adapter_names) if other == name], device=x.device)
            part = self._updated(x.index_select(0, rows), result.index_select(0, rows), name)
            result = result.index_copy(0, rows, part.to(result.dtype))
        return result
