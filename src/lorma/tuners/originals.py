"""What a merge leaves behind: the original parameter, a report, and bounds on what rounding changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorma.tuners.quantized import QuantizedOriginal


@dataclass(frozen=True)
class MergeReport:
    """What a merge or an unmerge did to one layer.

    ``error_bound`` bounds the distance (Frobenius norm) between the weight after undoing and the one before the first
    merge; it is 0 for snapshots and infinite where undoing is refused. ``condition`` is the largest condition number
    of a merged multiplier (``inverse`` only). ``requantization_error`` is the relative error (Frobenius norm) that
    rounding into a quantised base added to the exact merged weight.
    """

    layer: str
    undo: str
    error_bound: float
    condition: float | None = None
    requantization_error: float | None = None


class Original:
    """The parameter that a layer had before a merge."""

    def __init__(self, layer: Any) -> None:
        self.parameter = layer._parameter()

    def read(self, layer: Any) -> Tensor:
        """The original weight; ``layer`` is left as it is."""
        return self.parameter.data

    def restore(self, layer: Any) -> None:
        """Put the parameter back, to where and in the dtype in which the merged one is by now."""
        now = layer._parameter()
        self.parameter.data = self.parameter.data.to(device=now.device, dtype=now.dtype)
        setattr(layer.get_base_layer(), layer.weight_name, self.parameter)


def remember(layer: Any) -> Callable[[], None]:
    """Note everything that a merge changes; calling the result puts it back, whatever has happened since."""
    fields = ("_original", "_undo", "_ranges", "_pending_error", "_drift")
    state = {name: getattr(layer, name) for name in fields}
    merged = list(layer.merged_adapters)
    held = Original(layer) if layer.quantization_backend is None else QuantizedOriginal(layer)

    def put_back() -> None:
        held.restore(layer)
        vars(layer).update(state)
        layer.merged_adapters[:] = merged

    return put_back


def rounding_error(rounded: Tensor) -> float:
    """Bound (Frobenius norm) on what rounding to the dtype of ``rounded`` changed, its arithmetic done in float64."""
    info = torch.finfo(rounded.dtype)
    unit = info.eps / 2 + 64 * torch.finfo(torch.float64).eps
    return unit * (rounded.double().norm().item() + info.tiny * rounded.numel() ** 0.5)
