"""Merging adapters into a base weight and taking them out again, once for all tuners and layer kinds.

How a merge is undone is chosen when merging (``undo``):

* ``"snapshot"`` sets the original parameter aside whole and gives the base layer a new one. Unmerging puts back the
  very bits that were there, however often and in whatever precision, and costs one more copy of each merged weight.
  Every further merge starts again from the original, so adapters merged one by one give the same bits as together.
* ``"inverse"`` keeps nothing and multiplies by the inverse: exact but for rounding, with a bound on the error that is
  reported. Past a condition number of ``CONDITION_LIMIT`` the merge is refused, because the bound would be useless.
* ``"refuse"`` keeps nothing and cannot be undone: the cheapest for a model that is about to be saved.

A merge always makes a new parameter. Weights shared between layers (tied embeddings) therefore come apart when one of
them is merged, and are shared again after undoing a snapshot.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from dataclasses import replace
from typing import cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lorma.adapters.validation import check_choice
from lorma.functional.multiplier import widen
from lorma.tuners.devices import is_sharded
from lorma.tuners.merge_state import MergeReport, MergeState, rounding_error, take_snapshot
from lorma.tuners.quantized import dequantized, write_quantized

UNDO_CHOICES = ("snapshot", "inverse", "refuse")
QUANTIZED_CHOICES = ("requantize", "dequantize")
CONDITION_LIMIT = 1e4
"""Condition number of a multiplier up to which ``undo="inverse"`` merges."""


class MergeableLayer(BaseTunerLayer):
    """Mixin of a tuner layer: ``merge``, ``unmerge`` and ``get_delta_weight`` from one formula for ΔW."""

    base_layer: nn.Module
    layer_name: str
    weight_name = "weight"
    undo: dict[str, str]
    """How a merge of each adapter that the layer has is undone unless the call says otherwise."""
    quantized_merge: str | None = None
    """What ``merge`` does with a quantised base when the call does not say: refuse (None), or one of the choices."""
    model_dtype: torch.dtype | None = None
    """The dtype of the model around the layer, where it says one; full precision for ``quantized="dequantize"``."""
    twins: dict[str, list[MergeableLayer]]
    """For each adapter the layers that have the same weight and the same adapter, and stay tied when it is merged."""
    reports_to: list[MergeReport] | None = None
    """A list that takes the reports of merges made by PEFT, which does not hand on what ``merge`` returns."""

    merge_state: MergeState = MergeState()
    """What is merged and how, replaced by every merge and unmerge, never changed."""

    @abstractmethod
    def delta_weight_of(self, adapter_name: str, weight: Tensor) -> Tensor:
        """ΔW of one adapter acting on ``weight``, both in the layout in which the base layer stores its weight."""

    @abstractmethod
    def inverse_delta_weight_of(self, adapter_name: str, weight: Tensor) -> Tensor:
        """What to add to the merged ``weight`` to take one adapter out again.

        Raises:
            ValueError: if this adapter cannot be inverted.
        """

    @abstractmethod
    def singular_range_of(self, adapter_name: str) -> tuple[float, float]:
        """Largest and smallest singular value of what one adapter multiplies the weight by."""

    @abstractmethod
    def arithmetic_error_of(self, adapter_name: str, norm: float) -> float:
        """Bound on the error (Frobenius norm) of one adapter put into a weight of this norm, all done in float64."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging ``adapter`` alone would add to the unmerged base weight, in at least float32."""
        return self.delta_weight_of(adapter, widen(self.original_weight()))

    def original_weight(self) -> Tensor:
        """The base weight without any merged adapter, dequantised if need be.

        Raises:
            ValueError: if adapters are merged and no copy was kept; if the storage format cannot be read.
        """
        if self.merge_state.snapshot is not None:
            return self.merge_state.snapshot.read(self)
        if self.merged:
            raise ValueError(
                f"{self.layer_name} is merged with undo={self.merge_state.undo!r}: its original weight is not kept"
            )
        return self._current_weight()

    @torch.no_grad()
    def merge(  # type: ignore[override]
        self,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        *,
        undo: str | None = None,
        quantized: str | None = None,
    ) -> MergeReport | None:
        """Put adapters into the base weight, in the order given.

        The sum is formed in at least float32 (float64 for ``undo="inverse"``) and rounded once to the weight's dtype.

        Args:
            safe_merge: refuse, before anything is changed, if the result is not finite.
            adapter_names: which adapters; None takes the active ones in the order in which they act.
            undo: how ``unmerge`` will take them out: ``"snapshot"``, ``"inverse"`` or ``"refuse"``; None takes what the
                adapter's configuration says.
            quantized: what to do with a quantised base: ``"requantize"`` rounds the result into the base's format,
                ``"dequantize"`` replaces the base layer by one in full precision. There is no default.

        Raises:
            ValueError: if the merged weight holds NaN or infinity (``safe_merge``); if the base is quantised and
                ``quantized`` is not given, or its format cannot be merged into; if ``undo`` is not how this layer is
                merged already; with ``undo="inverse"`` if a multiplier is singular or its condition number is too high.
        """
        names = [name for name in dict.fromkeys(check_adapters_to_merge(self, adapter_names)) if name in self.undo]
        if not names:
            return None
        mode = self._unmerge_mode(undo, names)
        ranges = {name: self._well_conditioned(name) for name in names} if mode == "inverse" else {}
        how = self._check_quantized(quantized or self.quantized_merge)
        current = self._current_weight()
        if self.merged and mode == "snapshot":
            start, sequence = self.original_weight().to(current.device), [*self.merged_adapters, *names]
        else:
            start, sequence = current, names
        merged = start.double() if mode == "inverse" else widen(start)
        state = self.merge_state
        error = state.pending_error
        for name in sequence:
            if mode == "inverse":
                error = error * ranges[name][0] + self.arithmetic_error_of(name, merged.norm().item())
            merged = merged + self.delta_weight_of(name, merged)
        if safe_merge and not torch.isfinite(merged.to(current.dtype)).all():
            raise ValueError(
                f"NaNs detected in the merged weights of {self.layer_name}. "
                f"The adapter {','.join(names)} seems to be broken"
            )
        snapshot = state.snapshot
        if mode == "snapshot" and snapshot is None:
            snapshot = take_snapshot(self)
        lost = None
        if how is None:
            self._set_parameter(merged.to(current.dtype))
        else:
            lost = write_quantized(self, merged, how)
        pending = error + rounding_error(self._parameter()) if mode == "inverse" else state.pending_error
        self.merge_state = MergeState(mode, snapshot, {**state.ranges, **ranges}, pending, state.drift)
        self.merged_adapters.extend(names)
        self._join_twins()
        report = self._report(lost)
        if self.reports_to is not None:
            self.reports_to.append(report)
        return report

    @torch.no_grad()
    def unmerge(self) -> MergeReport | None:  # type: ignore[override]
        """Take every merged adapter out again, in the way chosen when they were merged.

        Raises:
            ValueError: if they were merged with ``undo="refuse"``.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return None
        state = self.merge_state
        if state.undo == "refuse":
            raise ValueError(f"{self.layer_name} was merged with undo='refuse'; it cannot be unmerged")
        if state.undo == "inverse":
            self._invert()
        elif state.snapshot is not None:
            state.snapshot.restore(self)
        report = self._report()
        self.merge_state = MergeState(state.undo, drift=self.merge_state.drift)
        self.merged_adapters.clear()
        return report

    def _join_twins(self) -> None:
        """Share the merged weight with a layer whose weight was the same, and which has the same merged into it."""
        for other in self.twins.get(self.merged_adapters[0], ()):
            tied = all(other in self.twins.get(name, ()) for name in self.merged_adapters)
            alike = other.merged_adapters == self.merged_adapters and other.merge_state.undo == self.merge_state.undo
            if tied and alike:
                setattr(self.get_base_layer(), self.weight_name, other._parameter())
                return

    def waiting_adapters(self) -> list[str]:
        """Active adapters that act in the forward pass, in their order.

        Of a merged layer those are the ones that were left out of a merge of some of the active adapters; they act
        after the merged ones. If only adapters that are not active were merged, the layer stands for those alone.
        """
        active = [name for name in self.active_adapters if name in self.undo]
        if self.merged_adapters and not any(name in self.merged_adapters for name in active):
            return []
        return [name for name in active if name not in self.merged_adapters]

    def check_order(self, names: list[str]) -> None:
        """Refuse a merge of ``names`` after which the active adapters would act in another order (``ValueError``)."""
        active = [name for name in self.active_adapters if name in self.undo]
        together = [*self.merged_adapters, *names]
        after = [n for n in together if n in active] + [n for n in active if n not in together]
        if after != active and any(name in names for name in active):
            raise ValueError(
                f"merging {', '.join(names)} into {self.layer_name} would change the order in which adapters act from "
                f"{', '.join(active)} to {', '.join(after)}; merge them in their order"
            )

    def check_merge(
        self, adapter_names: list[str] | None, undo: str | None, quantized: str | None, *, unload: bool = False
    ) -> None:
        """Refuse what ``merge`` would refuse and can be told without looking at a weight; see there.

        Unless the layer is about to be unloaded, also refuse an order in which the active adapters do not act.
        """
        names = self._to_merge(adapter_names)
        if names:
            if not unload:
                self.check_order(names)
            self._unmerge_mode(undo, names)
            self._check_quantized(quantized or self.quantized_merge)

    def _to_merge(self, adapter_names: list[str] | None) -> list[str]:
        asked = self.active_adapters if adapter_names is None else adapter_names
        return [name for name in dict.fromkeys(asked) if name in self.undo and name not in self.merged_adapters]

    def _unmerge_mode(self, undo: str | None, names: list[str]) -> str:
        if is_sharded(self._parameter()):
            raise ValueError(f"the weight of {self.layer_name} is sharded (FSDP2); merge in one process, after loading")
        if undo is None:
            undo = self.merge_state.undo if self.merged else self.undo[names[0]]
        check_choice("undo", undo, UNDO_CHOICES)
        if self.merged and undo != self.merge_state.undo:
            raise ValueError(
                f"undo={undo!r}: {self.layer_name} is already merged with undo={self.merge_state.undo!r}; unmerge it "
                "first"
            )
        if undo == "inverse" and self.quantization_backend is not None:
            raise ValueError(
                f"undo='inverse' is not allowed for {self.layer_name}: its base is quantised, and rounding into that "
                "format cannot be inverted; choose 'snapshot' or 'refuse'"
            )
        return undo

    def _well_conditioned(self, name: str) -> tuple[float, float]:
        largest, smallest = self.singular_range_of(name)
        condition = largest / smallest if smallest > 0 else float("inf")
        if not condition <= CONDITION_LIMIT:
            raise ValueError(
                f"undo='inverse' is refused for adapter {name!r} of {self.layer_name}: the condition number of its "
                f"multiplier is {condition:.3g}, the limit {CONDITION_LIMIT:.3g}; choose 'snapshot'"
            )
        return largest, smallest

    def _check_quantized(self, how: str | None) -> str | None:
        check_choice("quantized", how or QUANTIZED_CHOICES[0], QUANTIZED_CHOICES)
        if self.quantization_backend is None:
            return None
        if how is None:
            raise ValueError(
                f"the base weight of {self.layer_name} is quantised; say what merging shall do: quantized='requantize' "
                "rounds the merged weight into the same format and reports the error, quantized='dequantize' replaces "
                "the layer by one in full precision"
            )
        return how

    def _report(self, requantization_error: float | None = None) -> MergeReport:
        state = self.merge_state
        bound = {"snapshot": 0.0, "inverse": state.drift + state.pending_error, "refuse": float("inf")}[state.undo]
        condition = max(high / low for high, low in state.ranges.values()) if state.undo == "inverse" else None
        return MergeReport(self.layer_name, state.undo, bound, condition, requantization_error)

    def _invert(self) -> None:
        merged, state = self._floating_weight(), self.merge_state
        weight, pending = merged.double(), state.pending_error
        for name in reversed(self.merged_adapters):
            smallest = state.ranges[name][1]
            inexact = self.arithmetic_error_of(name, weight.norm().item()) / smallest**2
            weight = weight + self.inverse_delta_weight_of(name, weight)
            pending = pending / smallest + inexact
        restored = weight.to(merged.dtype)
        drift = state.drift + pending + rounding_error(restored)
        self.merge_state = replace(state, pending_error=0.0, drift=drift)
        self._set_parameter(restored)

    def _current_weight(self) -> Tensor:
        return dequantized(self) if self.quantization_backend is not None else self._floating_weight()

    def _parameter(self) -> nn.Parameter:
        return cast(nn.Parameter, getattr(self.get_base_layer(), self.weight_name))

    def _set_parameter(self, weight: Tensor) -> None:
        base, name = self.get_base_layer(), self.weight_name
        if parametrize.is_parametrized(base, name):
            raise ValueError(
                f"{self.layer_name}: {name} is computed by torch.nn.utils.parametrize; it cannot be replaced"
            )
        setattr(base, name, nn.Parameter(weight, requires_grad=self._parameter().requires_grad))

    def _floating_weight(self) -> Tensor:
        weight = self._parameter().detach()
        if not weight.is_floating_point() or weight.dtype.itemsize < 2:
            raise ValueError(
                f"the weight of {self.layer_name} is stored as {weight.dtype}; merging needs a floating-point weight "
                "(float16, bfloat16, float32 or float64)"
            )
        return weight
