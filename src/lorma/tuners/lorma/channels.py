"""Layers that map channels to channels: the base layer is a black box, and what goes in or comes out is multiplied.

pre: ``out = I(BA)·(base(x) − bias) + bias``; post: ``out = base(I(BA)·x)``. Neither reads the base weight, so any layer
that computes a linear map will do, whatever holds its weight. Only the update is added, ``out = base(x) + (I(BA) −
I)·dropout(y)``: at the start of training plus adds exact zeros, and in low precision a small update is not rounded
into a large weight.

Several active adapters act in the order in which they were activated, the first on W0 first. For post that means the
*last* one meets the input first: W0·M₁·M₂·x.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorma import functional
from lorma.functional.multiplier import Side
from lorma.tuners.lorma.config import LormaConfig
from lorma.tuners.lorma.fused import FusedProjection
from lorma.tuners.lorma.layer import LormaLayer
from lorma.tuners.placing import gathered, in_place, whole

Routes = list[tuple[Tensor | None, list[str]]]
"""Which rows of a batch (None: all) pass through which adapters, in their order."""
BASE = "__base__"


class ChannelLayer(nn.Module, LormaLayer):
    """Forward pass of every layer whose input and output have a channel dimension."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        *,
        layer_name: str,
        r: int,
        lorma_alpha: float,
        config: LormaConfig,
        fused: FusedProjection | None = None,
        **quantization_kwargs: Any,
    ) -> None:
        super().__init__()
        LormaLayer.__init__(self, base_layer, layer_name, **quantization_kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lorma_alpha, config, fused)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """The adapted layer. ``adapter_names`` names one adapter for each row of the batch (``"__base__"`` for none).

        Raises:
            ValueError: if ``adapter_names`` does not fit the batch, or adapters are merged.
        """
        if adapter_names is not None:
            self._check_adapter_names(x, adapter_names)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        routes = self._routes(x, adapter_names)
        with in_place((self.lorma_A, self.lorma_B, self.lorma_magnitude_vector)):
            if not x.is_meta:
                self.check_factors_loaded([name for _, names in routes for name in names])
            result = self._call_base(x, routes, *args, **kwargs)
            with in_place((self.get_base_layer(),)):
                return self._multiply_outputs(result, routes)

    def _routes(self, x: Tensor, adapter_names: list[str] | None) -> Routes:
        if adapter_names is None:
            return [(None, self.waiting_adapters())]
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(adapter_names):
            if name in self.lorma_A:
                rows.setdefault(name, []).append(row)
        return [(torch.tensor(where, device=x.device), [name]) for name, where in rows.items()]

    def _check_adapter_names(self, x: Tensor, adapter_names: list[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    # Where an adapter acts

    def _acts_on_inputs(self, adapter_name: str) -> bool:
        return self.side[adapter_name] == "post"

    def _call_base(self, x: Tensor, routes: Routes, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer on multiplied inputs."""
        steps = [(rows, name) for rows, names in routes for name in reversed(names) if self._acts_on_inputs(name)]
        if any(name in self.fused for _, name in steps):
            self._check_fused_order(routes)
            return self._call_fused_base(x, steps, *args, **kwargs)
        for rows, name in steps:
            x = self._multiplied_input(x, rows, name, *self._parts(name)[0][1:])
        return self.base_layer(x, *args, **kwargs)

    def _check_fused_order(self, routes: Routes) -> None:
        for _, names in routes:
            whole = None
            for name in names:
                if name not in self.fused and not self._acts_on_inputs(name):
                    whole = name
                elif name in self.fused and self._acts_on_inputs(name) and whole is not None:
                    raise ValueError(
                        f"on {self.layer_name}, adapter {name!r} multiplies the inputs of single slices and cannot act "
                        f"after {whole!r}, which multiplies all outputs together; activate {name!r} first"
                    )

    def _call_fused_base(self, x: Tensor, steps: list[tuple[Tensor | None, str]], *args: Any, **kwargs: Any) -> Tensor:
        """The base layer once for each input that some slice has; an input is known by the steps that led to it."""
        cut = next(self.fused[name] for _, name in steps if name in self.fused)
        inputs: dict[tuple[tuple[int, int], ...], Tensor] = {(): x}
        paths: list[tuple[tuple[int, int], ...]] = [()] * len(cut.splits)
        for number, (rows, name) in enumerate(steps):
            parts = self._parts(name)
            adapt = self.fused[name].adapt if name in self.fused else range(len(paths))
            for position, index in enumerate(adapt):
                part = position if name in self.fused else 0
                path = (*paths[index], (number, part))
                if path not in inputs:
                    inputs[path] = self._multiplied_input(inputs[paths[index]], rows, name, *parts[part][1:])
                paths[index] = path
        outputs = {path: self.base_layer(inputs[path], *args, **kwargs) for path in dict.fromkeys(paths)}
        return torch.cat([outputs[path][..., cut.rows(i)] for i, path in enumerate(paths)], dim=-1)

    def _multiplied_input(self, x: Tensor, rows: Tensor | None, name: str, A: Tensor, B: Tensor) -> Tensor:
        part = x if rows is None else x.index_select(0, rows)
        part = (part + self._update(part, name, A, B)).to(x.dtype)
        return part if rows is None else x.index_copy(0, rows, part)

    def _multiply_outputs(self, result: Tensor, routes: Routes) -> Tensor:
        dtype = result.dtype
        bias = self._bias()
        for rows, names in routes:
            names = [n for n in names if not self._acts_on_inputs(n) or n in self.lorma_magnitude_vector]
            if not names:
                continue
            out = result if rows is None else result.index_select(0, rows)
            y = out if bias is None else out - bias
            for position, name in enumerate(names):
                update = self._output_update(y, name)
                out = out + update
                if position + 1 < len(names):
                    y = y + update
            result = out if rows is None else result.index_copy(0, rows, out.to(dtype))
        return result.to(dtype)

    def _output_update(self, y: Tensor, name: str) -> Tensor:
        """What one adapter adds to the layer's output without its bias."""
        update = None if self._acts_on_inputs(name) else self.multiplier_update(y, name)
        if name not in self.lorma_magnitude_vector:
            return cast(Tensor, update)
        factor = self._along_channels(self.magnitude_factor(name))
        rescaled = (factor - 1) * y
        return rescaled if update is None else rescaled + factor * update

    def multiplier_update(self, y: Tensor, adapter_name: str) -> Tensor:
        """``(I(BA) − I)·dropout(y)`` in the dtype of the adapter; zero in slices that are not adapted."""
        parts = self._parts(adapter_name)
        if adapter_name not in self.fused:
            return self._update(y, adapter_name, *parts[0][1:])
        slices = list(y.split(self.fused[adapter_name].splits, dim=-1))
        updates = dict(zip(self.fused[adapter_name].adapt, parts, strict=True))
        return torch.cat(
            [
                self._update(piece, adapter_name, *updates[i][1:])
                if i in updates
                else torch.zeros_like(piece, dtype=self.lorma_A[adapter_name].dtype)
                for i, piece in enumerate(slices)
            ],
            dim=-1,
        )

    def _update(self, x: Tensor, name: str, A: Tensor, B: Tensor) -> Tensor:
        x = self.lorma_dropout[name](self._cast_input_dtype(x, A.dtype))
        return functional.multiplier_update(x, A, B, self.scaling[name], self.inflation[name])

    def _bias(self) -> Tensor | None:
        bias = getattr(self.get_base_layer(), "bias", None)
        return None if bias is None else self._along_channels(whole(bias))

    def _along_channels(self, vector: Tensor) -> Tensor:
        """A vector over output channels, shaped to be added to an output."""
        return vector

    def train(self, mode: bool = True) -> Any:
        """As every module's; DoRA's kept norms are dropped, so that weights written past autograd are seen."""
        self._norms.clear()
        return super().train(mode)

    def __repr__(self) -> str:
        return "lorma." + super().__repr__()


class Linear(ChannelLayer):
    """LoRMA on ``nn.Linear``, transformers' ``Conv1D`` and every quantised linear layer."""

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the base layer stores its weight as in × out."""
        return isinstance(self.get_base_layer(), Conv1D)

    def _matrices(self, weight: Tensor, side: Side) -> Tensor:
        return weight.T if self.fan_in_fan_out else weight

    def _along_rows(self, vector: Tensor, weight: Tensor) -> Tensor:
        return vector if self.fan_in_fan_out else super()._along_rows(vector, weight)


class ConvNd(ChannelLayer):
    """LoRMA on ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``, on their channels.

    ``pre`` multiplies the output channels, ``post`` the input channels, at every position alike. With groups, each
    group has its own multiplier, so that the merged kernel keeps its groups.
    """

    @property
    def blocks(self) -> int:  # type: ignore[override]
        """Groups of the convolution."""
        return cast(int, self.get_base_layer().groups)

    @property
    def _positions(self) -> int:
        return len(cast(Any, self.get_base_layer()).kernel_size)

    def _matrices(self, weight: Tensor, side: Side) -> Tensor:
        matrices = weight.unflatten(0, (self.blocks, -1))
        matrices = matrices.flatten(2) if side == "pre" else matrices.flatten(3).movedim(3, 1)
        return matrices if self.blocks > 1 else matrices[0]

    def _join_norms(self, norms: Tensor) -> Tensor:
        positions = math.prod(cast(Any, self.get_base_layer()).kernel_size)
        if norms.numel() > self.out_features:
            norms = norms.unflatten(-2, (-1, positions)).square().sum(-2).sqrt()
        return norms.flatten()

    def _update(self, x: Tensor, name: str, A: Tensor, B: Tensor) -> Tensor:
        axis = x.ndim - self._positions - 1
        x = x.movedim(axis, -1)
        if self.blocks == 1:
            return super()._update(x, name, A, B).movedim(-1, axis)
        grouped = x.unflatten(-1, (self.blocks, -1)).movedim(-2, 0)
        update = super()._update(grouped.flatten(1, -2), name, A, B).reshape(grouped.shape)
        return update.movedim(0, -2).flatten(-2).movedim(-1, axis)

    def _along_channels(self, vector: Tensor) -> Tensor:
        return vector.reshape(-1, *(1,) * self._positions)


class Embedding(ChannelLayer):
    """LoRMA on ``nn.Embedding``, on the embedding dimension D.

    The weight is V × D and is multiplied from the right, ``W0·I(BA)`` (side ``post``): row v becomes ``I(BA)ᵀ·w_v``,
    which is the base layer's output multiplied. Side ``pre`` would need a V × V multiplier; ``side="pre"`` and
    ``"auto"`` take ``post`` here.
    """

    sides = ("post",)

    def _features(self) -> tuple[int, int]:
        base: Any = self.get_base_layer()
        return base.embedding_dim, base.embedding_dim

    def _acts_on_inputs(self, adapter_name: str) -> bool:
        return False

    def _update(self, x: Tensor, name: str, A: Tensor, B: Tensor) -> Tensor:
        x = self.lorma_dropout[name](self._cast_input_dtype(x, A.dtype))
        return functional.multiplier_update(x, A, B, self.scaling[name], self.inflation[name], transpose=True)

    def _along_rows(self, vector: Tensor, weight: Tensor) -> Tensor:
        return vector

    @torch.no_grad()
    def _multiplied_norms(self, adapter_name: str) -> Tensor:
        """Norms of the columns of W0·I(BA), as those of the rows of I(BA)ᵀ·W0ᵀ."""
        A, B = self.lorma_A[adapter_name], self.lorma_B[adapter_name]
        with gathered(self.get_base_layer()):
            weight = whole(self.original_weight()).mT
            norms = functional.multiplied_row_norms(weight, B.mT, A.mT, self.scaling[adapter_name], "pre")
        return norms.to(A.device)
