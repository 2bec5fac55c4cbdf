"""What every LoRMA layer has, whatever it wraps: factors, scalings, the formula for ΔW.

The multiplied side of a weight has N numbers in all, and A (r × N) and B (N × r) are stored whole. Mostly that is one
multiplier with n = N. Where a layer holds several matrices, each has its own multiplier, and A and B are cut along N:
groups of a convolution and experts into equal parts (one batched operation), slices of a fused projection into parts
of their own widths.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lorma import functional
from lorma.adapters.validation import check_scaling
from lorma.functional.multiplier import Inflation, Scaling, Side
from lorma.kernels import TensorCache
from lorma.methods.lorma.tuner.config import LormaConfig
from lorma.methods.lorma.tuner.dora import MagnitudeLayer, broadcast_factor
from lorma.methods.lorma.tuner.fused import FusedProjection
from lorma.tuners.factors import MAGNITUDE, Factors


class LormaLayer(MagnitudeLayer):
    """Base of all LoRMA layers.

    Attributes, each keyed by adapter name: ``lorma_A`` (r × N), ``lorma_B`` (N × r), ``r``, ``lorma_alpha``,
    ``scaling``, ``lorma_dropout``, ``inflation``, ``side`` (``"pre"`` or ``"post"``; ``"auto"`` is resolved here),
    ``undo``, ``fused`` (only for fused projections) and ``lorma_magnitude_vector`` (only with DoRA).
    """

    adapter_layer_names = ("lorma_A", "lorma_B", "lorma_magnitude_vector")
    other_param_names = (
        "r",
        "lorma_alpha",
        "scaling",
        "lorma_dropout",
        "inflation",
        "side",
        "undo",
        "fused",
        "twins",
        "_norms",
    )
    sides: tuple[Side, ...] = ("pre", "post")
    """Sides that can be multiplied, the one taken for ``"pre"`` where there is no choice first."""

    def __init__(self, base_layer: nn.Module, layer_name: str, **quantization_kwargs: Any) -> None:
        super().__init__(base_layer, layer_name, **quantization_kwargs)
        self.r: dict[str, int] = {}
        self.lorma_alpha: dict[str, float] = {}
        self.scaling: dict[str, Scaling] = {}
        self.inflation: dict[str, Inflation] = {}
        self.side: dict[str, Side] = {}
        self.fused: dict[str, FusedProjection] = {}
        self.lorma_dropout = nn.ModuleDict({})
        self.lorma_A = Factors()
        self.lorma_B = Factors()
        self.lorma_magnitude_vector = Factors(MAGNITUDE)
        self._norms: dict[str, TensorCache] = {}

    def _width(self, side: Side, fused: FusedProjection | None) -> int:
        """N, the numbers on the multiplied side taken together."""
        if fused is not None:
            return fused.width(side, self.in_features)
        return self.out_features if side == "pre" else self.in_features

    def update_layer(
        self,
        adapter_name: str,
        *,
        config: LormaConfig,
        r: int,
        lorma_alpha: float,
        fused: FusedProjection | None = None,
    ) -> None:
        """Add an adapter, or replace the one of this name."""
        if len(self.sides) == 1:
            side = self.sides[0]
        elif config.side == "auto":
            side = "pre" if self._width("pre", fused) <= self._width("post", fused) else "post"
        else:
            side = cast(Side, config.side)
        N = self._width(side, fused)
        self.r[adapter_name] = r
        self.lorma_alpha[adapter_name] = lorma_alpha
        self.scaling[adapter_name] = config.scaling(r, lorma_alpha)
        self.inflation[adapter_name] = cast(Inflation, config.inflation)
        self.side[adapter_name] = side
        self.undo[adapter_name] = config.undo
        self.twins.pop(adapter_name, None)
        self._set_fused(adapter_name, fused)
        dropout = nn.Dropout(config.lorma_dropout) if config.lorma_dropout > 0 else nn.Identity()
        self.lorma_dropout[adapter_name] = dropout
        dtype = self._start_dtype()
        check_scaling(self.layer_name, config.scaling(r, lorma_alpha), torch.finfo(dtype))
        self.lorma_A[adapter_name] = nn.Parameter(torch.empty(r, N, dtype=dtype))
        self.lorma_B[adapter_name] = nn.Parameter(torch.empty(N, r, dtype=dtype))
        self.reset_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if config.use_dora:
            self._start_magnitude(adapter_name)
        self.set_adapter(self.active_adapters)

    def tie(self, adapter_name: str, source: Any) -> None:
        """As every layer's: ``W0·I(BA)`` on both, with one A and one B."""
        for values in ("r", "lorma_alpha", "scaling", "inflation", "side"):
            getattr(self, values)[adapter_name] = getattr(source, values)[adapter_name]
        self.fused.pop(adapter_name, None)
        self.lorma_A.share(adapter_name, source.lorma_A)
        self.lorma_B.share(adapter_name, source.lorma_B)
        super().tie(adapter_name, source)

    def _set_fused(self, adapter_name: str, fused: FusedProjection | None) -> None:
        self.fused.pop(adapter_name, None)
        if fused is None:
            return
        for other, known in self.fused.items():
            if known.splits != fused.splits:
                raise ValueError(
                    f"fused_projections: adapter {adapter_name!r} cuts {self.layer_name} into {list(fused.splits)}, "
                    f"but adapter {other!r} cuts it into {list(known.splits)}; all adapters must cut it alike"
                )
        self.fused[adapter_name] = fused

    def reset_parameters(self, adapter_name: str, init_weights: bool) -> None:
        """Fill A and B with the start of training, or with noise if ``init_weights`` is False."""
        if self.lorma_A[adapter_name].is_meta:
            return
        with torch.no_grad():
            for _, A, B in self._parts(adapter_name):
                for a, b in zip(A, B, strict=True) if A.ndim == 3 else [(A, B)]:
                    if init_weights:
                        functional.init_factors(a, b, self.scaling[adapter_name], self.inflation[adapter_name])
                    else:
                        for factor in (a, b):
                            nn.init.kaiming_uniform_(factor, a=5**0.5)

    def cast_adapter(self, adapter_name: str, dtype: torch.dtype) -> None:
        """Cast the factors (and DoRA's magnitude) of one adapter to ``dtype``.

        Raises:
            ValueError: the scaling overflows or vanishes there.
        """
        if adapter_name in self.scaling:
            check_scaling(self.layer_name, float(self.scaling[adapter_name]), torch.finfo(dtype))
        super().cast_adapter(adapter_name, dtype)
        self._norms.clear()

    def set_scaling(self, adapter_name: str, value: float) -> None:
        """Change the scalar s of one adapter, in place if it is a tensor."""
        held = self.scaling[adapter_name]
        if isinstance(held, Tensor):
            held.fill_(value)
        else:
            self.scaling[adapter_name] = value
        self._norms.clear()

    # The weight as matrices, and what an adapter does to them

    def _matrices(self, weight: Tensor, side: Side) -> Tensor:
        """``weight`` as a view of shape (…, d, k) whose multiplied side is ``side``."""
        return weight

    def _batched(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """A and B as (blocks, r, n) and (blocks, n, r), or as they are if there is one block."""
        if self.blocks == 1:
            return A, B
        return A.unflatten(1, (self.blocks, -1)).movedim(1, 0), B.unflatten(0, (self.blocks, -1))

    def _parts(self, adapter_name: str, dtype: torch.dtype | None = None) -> list[tuple[slice, Tensor, Tensor]]:
        """The multipliers of an adapter: which rows of the weight each acts on, its A and its B."""
        A, B = self.lorma_A[adapter_name], self.lorma_B[adapter_name]
        if dtype is not None:
            A, B = A.to(dtype), B.to(dtype)
        return self._cut(A, B, adapter_name)

    def _cut(self, A: Tensor, B: Tensor, adapter_name: str) -> list[tuple[slice, Tensor, Tensor]]:
        if adapter_name in self.fused:
            cuts = self.fused[adapter_name].cuts(self.side[adapter_name], self.in_features)
            return [(rows, A[:, columns], B[columns]) for rows, columns in cuts]
        return [(slice(None), *self._batched(A, B))]

    def joined(self, names: list[str]) -> tuple[Tensor, Tensor]:
        """A (R × N) and B (N × R), R = Σr, of the adapter of scaling 1 that equals ``names``, the first on W0 first.

        Raises:
            ValueError: an adapter that is not closed under products: another inflation than plus, or DoRA's magnitudes.
        """
        for name in names:
            if self.inflation[name] != "plus" or name in self.lorma_magnitude_vector:
                raise ValueError(f"adapter {name!r} of {self.layer_name} is not closed under products of low rank")
        R = sum(self.r[name] for name in names)
        A = self.lorma_A[names[0]].new_empty(R, self.lorma_A[names[0]].shape[1])
        B = torch.empty_like(A.T).contiguous()
        parts = [self._parts(name) for name in names]
        for index, (_, a, b) in enumerate(self._cut(A, B, names[-1])):
            factors = [(*part[index][1:], self.scaling[name]) for part, name in zip(parts, names, strict=True)]
            new_a, new_b = functional.compose_all(factors, self.side[names[-1]])
            a.copy_(new_a)
            b.copy_(new_b)
        return A, B

    def delta_weight_of(self, adapter_name: str, weight: Tensor) -> Tensor:
        """ΔW of one adapter acting on ``weight``, both in the layout in which the base layer stores its weight."""
        delta = self._delta(adapter_name, weight, functional.delta_weight)
        if adapter_name in self.lorma_magnitude_vector:
            factor = self._along_rows(self.magnitude_factor(adapter_name).to(weight.dtype), weight)
            delta = (factor - 1) * weight + factor * delta
        return delta

    def inverse_delta_weight_of(self, adapter_name: str, weight: Tensor) -> Tensor:
        """What to add to the merged ``weight`` to take one adapter out again."""
        return self._delta(adapter_name, weight, functional.inverse_delta_weight)

    def _delta(self, adapter_name: str, weight: Tensor, formula: Any) -> Tensor:
        side = self.side[adapter_name]
        s, inflation = self.scaling[adapter_name], self.inflation[adapter_name]
        weight = weight.contiguous()
        delta = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
        source, target = self._matrices(weight, side), self._matrices(delta, side)
        for rows, A, B in self._parts(adapter_name, weight.dtype):
            A, B = (broadcast_factor(t, source) for t in (A, B))
            target[..., rows, :] = formula(source[..., rows, :], A, B, s, inflation, side)
        return delta

    def lora_form_of(self, adapter_name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        """As every layer's. r' is the adapter's rank, on a fused projection the ranks of its slices together.

        See :func:`functional.lora_form`.
        """
        side, inflation = self.side[adapter_name], self.inflation[adapter_name]
        where = f"adapter {adapter_name!r} of {self.layer_name} is no LoRA"
        if inflation != "plus":
            raise ValueError(f"{where}: with inflation={inflation!r} the update of the weight has full rank")
        if adapter_name in self.lorma_magnitude_vector:
            raise ValueError(f"{where}: use_dora rescales whole rows of the weight")
        source = self._matrices(weight, side)
        if self.blocks > 1 or source.ndim != 2:
            raise ValueError(f"{where}: each group, expert or kernel position of the weight has an update of its own")
        downs, ups = [], []
        for rows, A, B in self._parts(adapter_name, weight.dtype):
            A, B = (broadcast_factor(t, source) for t in (A, B))
            down, up = functional.lora_form(source[rows], A, B, self.scaling[adapter_name], side)
            downs.append(down)
            ups.append(up.new_zeros(source.shape[0], up.shape[1]).index_copy(0, _indices(rows, source), up))
        return torch.cat(downs), torch.cat(ups, dim=1)

    def singular_range_of(self, adapter_name: str) -> tuple[float, float]:
        """Largest and smallest singular value of an adapter's multipliers.

        Raises:
            ValueError: for DoRA, whose row scaling needs the norms of the very weight that a merge overwrites.
        """
        if adapter_name in self.lorma_magnitude_vector:
            raise ValueError(
                f"undo='inverse' is not allowed for adapter {adapter_name!r} of {self.layer_name}: with use_dora the "
                "norms of the unmerged weight would be needed; choose 'snapshot' or 'refuse'"
            )
        s, inflation = self.scaling[adapter_name], self.inflation[adapter_name]
        ranges = [functional.singular_range(A, B, s, inflation) for _, A, B in self._parts(adapter_name, torch.float64)]
        return max(high.max().item() for high, _ in ranges), min(low.min().item() for _, low in ranges)

    def arithmetic_error_of(self, adapter_name: str, norm: float) -> float:
        """Bound on the error (Frobenius norm) of multiplying a weight of this norm in float64."""
        unit, s = torch.finfo(torch.float64).eps, float(self.scaling[adapter_name])
        parts = self._parts(adapter_name, torch.float64)
        size = max((A.flatten(-2).norm(dim=-1) * B.flatten(-2).norm(dim=-1)).max().item() for _, A, B in parts)
        return 4 * unit * parts[0][1].shape[-1] * (1 + s * size) * norm


def _indices(rows: slice, matrix: Tensor) -> Tensor:
    return torch.arange(len(matrix), device=matrix.device)[rows]
