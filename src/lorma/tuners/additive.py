"""Layers whose adapters add a matrix to the weight that does not depend on it: ``W0 + Σ ΔWᵢ``.

A subclass gives its update, and ``lora_form_of`` where that is a product of two factors; how it is taken out again, in
which order adapters may come, and how far it stretches the weight follow.
"""

from __future__ import annotations

from torch import Tensor

from lorma.tuners.layer import AdapterLayer


class AdditiveLayer(AdapterLayer):
    """Base of the layers of additive methods."""

    def inverse_delta_weight_of(self, adapter_name: str, weight: Tensor) -> Tensor:
        """``−ΔW``, whatever ``weight`` holds."""
        return -self.delta_weight_of(adapter_name, weight)

    def singular_range_of(self, adapter_name: str) -> tuple[float, float]:
        """1 and 1: the weight is multiplied by nothing."""
        return 1.0, 1.0

    def check_order(self, names: list[str]) -> None:
        """A sum may be taken in any order."""
