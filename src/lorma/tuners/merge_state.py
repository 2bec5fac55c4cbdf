"""What a merge leaves behind: a snapshot of the weight, the state of the layer, a report, bounds on rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorma.tuners.quantized import QuantizedSnapshot


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


class Snapshot:
    """The parameter that a layer had before a merge, to be put back bit for bit."""

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


def take_snapshot(layer: Any) -> Snapshot | QuantizedSnapshot:
    """What a layer's base weight is now, in whatever format."""
    return Snapshot(layer) if layer.quantization_backend is None else QuantizedSnapshot(layer)


@dataclass(frozen=True)
class MergeState:
    """How the adapters that are merged into a layer were merged.

    Attributes:
        undo: how they are taken out again.
        snapshot: the weight before the first merge, where it is kept.
        ranges: largest and smallest singular value of each multiplier (``inverse`` only).
        pending_error: bound on the error of the merged weight, by which undoing it will be off.
        drift: bound on what merges that are undone have changed.
    """

    undo: str = "snapshot"
    snapshot: Snapshot | QuantizedSnapshot | None = None
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    pending_error: float = 0.0
    drift: float = 0.0


def remember(layer: Any) -> Callable[[], None]:
    """Note everything that a merge changes; calling the result puts it back, whatever has happened since."""
    state, merged, snapshot = layer.merge_state, list(layer.merged_adapters), take_snapshot(layer)

    def put_back() -> None:
        snapshot.restore(layer)
        layer.merge_state = state
        layer.merged_adapters[:] = merged

    return put_back


def rounding_error(rounded: Tensor) -> float:
    """Bound (Frobenius norm) on what rounding to the dtype of ``rounded`` changed, its arithmetic done in float64."""
    info = torch.finfo(rounded.dtype)
    unit = info.eps / 2 + 64 * torch.finfo(torch.float64).eps
    return unit * (rounded.double().norm().item() + info.tiny * rounded.numel() ** 0.5)
