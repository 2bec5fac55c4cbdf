"""DoRMA: rows of the multiplied weight rescaled to a trained magnitude (DoRA, arXiv 2402.09353, on LoRMA₊)."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorma import functional
from lorma.functional.multiplier import Scaling, Side, widen
from lorma.kernels import TensorCache
from lorma.tuners.devices import full_tensor, gathered
from lorma.tuners.factors import Factors
from lorma.tuners.layer import AdapterLayer


def broadcast_factor(factor: Tensor, matrices: Tensor) -> Tensor:
    """A factor (…, r, n) on the device of ``matrices`` (…, d, k), with as many dimensions."""
    missing = (1,) * (matrices.ndim - factor.ndim)
    return factor.to(matrices.device).reshape(factor.shape[:-2] + missing + factor.shape[-2:])


class MagnitudeLayer(AdapterLayer):
    """What a layer needs for ``use_dora``: the magnitudes, the norms they are divided by, and keeping the norms."""

    lorma_A: Factors
    lorma_B: Factors
    lorma_magnitude_vector: Factors
    side: dict[str, Side]
    scaling: dict[str, Scaling]
    out_features: int
    _norms: dict[str, TensorCache]

    @abstractmethod
    def _matrices(self, weight: Tensor, side: Side) -> Tensor:
        """``weight`` as a view of shape (…, d, k) whose multiplied side is ``side``."""

    @abstractmethod
    def _parts(self, adapter_name: str, dtype: torch.dtype | None = None) -> list[tuple[slice, Tensor, Tensor]]:
        """The multipliers of an adapter: which rows of the weight each acts on, its A and its B."""

    def check_merge(
        self, adapter_names: list[str] | None, undo: str | None, quantized: str | None, *, unload: bool = False
    ) -> None:
        """As every layer's; refuses as well to lose the original weight while a DoRA adapter needs its norms."""
        super().check_merge(adapter_names, undo, quantized, unload=unload)
        names = self._to_merge(adapter_names)
        if unload or not names:
            return
        mode = self._unmerge_mode(undo, names)
        done = [*names, *self.merged_adapters]
        left_out = [n for n in self.lorma_magnitude_vector if n in self.active_adapters and n not in done]
        if mode != "snapshot" and left_out:
            raise ValueError(
                f"undo={mode!r} is not allowed while the DoRA adapter {left_out[0]!r} of {self.layer_name} acts "
                "unmerged: it needs the norms of the original weight; choose 'snapshot'"
            )

    def _start_magnitude(self, adapter_name: str) -> None:
        A = self.lorma_A[adapter_name]
        if A.is_meta:
            start = torch.empty(self.out_features, dtype=A.dtype, device=A.device)
        else:
            start = self._multiplied_norms(adapter_name).to(A.dtype)
        self.lorma_magnitude_vector[adapter_name] = nn.Parameter(start)
        self._norms.pop(adapter_name, None)

    def _along_rows(self, vector: Tensor, weight: Tensor) -> Tensor:
        """``vector`` (one number a row of the matrix) shaped to multiply the stored ``weight``."""
        return vector.reshape(-1, *(1,) * (weight.ndim - 1))

    @torch.no_grad()
    def _multiplied_norms(self, adapter_name: str) -> Tensor:
        """Norms of the rows of W0 multiplied by this adapter alone; see :func:`functional.multiplied_row_norms`."""
        side = self.side[adapter_name]
        with gathered(self.get_base_layer()):
            matrices = self._matrices(full_tensor(self.original_weight()), side)
            ((_, A, B),) = self._parts(adapter_name)
            A, B = (broadcast_factor(widen(t), matrices) for t in (A, B))
            norms = functional.multiplied_row_norms(matrices, A, B, self.scaling[adapter_name], side)
        return self._join_norms(norms).to(self.lorma_A[adapter_name].device)

    def _join_norms(self, norms: Tensor) -> Tensor:
        return norms

    def magnitude_factor(self, adapter_name: str) -> Tensor:
        """DoRA's factor of every output: magnitude / ‖row of the multiplied weight‖, the norm not differentiated.

        The norms are kept between forward passes in evaluation mode without gradients.
        """
        magnitude = self.lorma_magnitude_vector[adapter_name]
        if torch.compiler.is_compiling():
            return self._factor(magnitude, self._multiplied_norms(adapter_name))
        if torch.is_grad_enabled() or cast(Any, self).training:
            self._norms.pop(adapter_name, None)
            return self._factor(magnitude, self._multiplied_norms(adapter_name))
        cache = self._norms.setdefault(adapter_name, TensorCache())
        A, B, s = self.lorma_A[adapter_name], self.lorma_B[adapter_name], self.scaling[adapter_name]
        weight = cast(Tensor, self.get_base_layer().weight)
        norms = cache.look_up(weight, A, B, s)
        if norms is None:
            norms = self._multiplied_norms(adapter_name)
            cache.keep(norms, weight, A, B, s)
        return self._factor(magnitude, norms)

    def _factor(self, magnitude: Tensor, norms: Tensor) -> Tensor:
        factor = magnitude.to(norms.dtype) / norms.clamp_min(torch.finfo(norms.dtype).tiny)
        return factor.to(magnitude.dtype)
