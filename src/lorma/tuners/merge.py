"""Merging adapters into a base weight and taking them out again, once for all tuners and layer kinds.

A merge leaves the original tensor alone: it is set aside whole and the base layer is given a new one, so unmerging
puts back the very bits that were there, however often and in whatever precision. The cost is one more copy of each
merged weight for as long as it is merged; ``merge_and_unload`` drops it layer by layer.

Every merge starts again from the set-aside original, so adapters merged one by one give the same bits as the same
adapters merged in one call.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor

from lorma.functional.multiplier import widen


class SnapshotMerge(BaseTunerLayer):
    """Mixin of a tuner layer: ``merge``, ``unmerge`` and ``get_delta_weight`` from one formula for ΔW."""

    layer_name: str
    _snapshot: Tensor | None = None

    @abstractmethod
    def delta_weight_of(self, adapter_name: str, weight: Tensor) -> Tensor:
        """ΔW of one adapter acting on ``weight``, both in the layout in which the base layer stores its weight."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging ``adapter`` alone would add to the unmerged base weight, in at least float32."""
        weight = self._snapshot if self._snapshot is not None else self._floating_weight()
        return self.delta_weight_of(adapter, widen(weight))

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put adapters into the base weight, in the order given.

        The sum is formed in at least float32 and rounded once to the weight's dtype.

        Args:
            safe_merge: refuse, before anything is changed, if the result is not finite.
            adapter_names: which adapters; None takes the active ones in the order in which they act.

        Raises:
            ValueError: with ``safe_merge`` if the merged weight holds NaN or infinity; if the base weight is quantised.
        """
        known = self._get_available_adapters()
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in known]
        if not names:
            return
        current = self._floating_weight()
        original = current if self._snapshot is None else self._snapshot.to(current.device, current.dtype)
        merged = widen(original)
        for name in [*self.merged_adapters, *names]:
            merged = merged + self.delta_weight_of(name, merged)
        merged = merged.to(original.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(
                f"NaNs detected in the merged weights of {self.layer_name}. "
                f"The adapter {','.join(names)} seems to be broken"
            )
        self._snapshot = original
        self.get_base_layer().weight.data = merged
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the original weight back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight = cast(Tensor, self.get_base_layer().weight)
        if self._snapshot is not None:
            weight.data = self._snapshot.to(device=weight.device, dtype=weight.dtype)
        self._snapshot = None
        self.merged_adapters.clear()

    def _floating_weight(self) -> Tensor:
        weight = cast(Tensor, self.get_base_layer().weight).data
        if not weight.is_floating_point():
            raise ValueError(
                f"the weight of {self.layer_name} is stored as {weight.dtype}; merging needs a floating-point weight "
                "(float16, bfloat16, float32 or float64)"
            )
        return weight
