"""LoRMA on convolutions, on their channels."""

from __future__ import annotations

import math
from typing import Any, cast

from torch import Tensor

from lorma.functional.multiplier import Side
from lorma.methods.lorma.tuner.channels import ChannelLayer


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

    def _channels_last(self, x: Tensor) -> Tensor:
        return x.movedim(-1 - self._positions, -1)

    def _channels_back(self, x: Tensor) -> Tensor:
        return x.movedim(-1, -1 - self._positions)

    def _update(self, x: Tensor, name: str, A: Tensor, B: Tensor) -> Tensor:
        x = self._channels_last(x)
        if self.blocks == 1:
            return self._channels_back(super()._update(x, name, A, B))
        grouped = x.unflatten(-1, (self.blocks, -1)).movedim(-2, 0)
        update = super()._update(grouped.flatten(1, -2), name, A, B).reshape(grouped.shape)
        return self._channels_back(update.movedim(0, -2).flatten(-2))

    def _along_channels(self, vector: Tensor) -> Tensor:
        return vector.reshape(-1, *(1,) * self._positions)
