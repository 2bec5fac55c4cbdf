"""LoRMA on nn.MultiheadAttention."""

from __future__ import annotations

from torch import Tensor

from lorma.functional.multiplier import Side
from lorma.methods.lorma.tuner.linear import Linear
from lorma.methods.lorma.tuner.parameter import LormaParameterLayer
from lorma.tuners.attention import AttentionLayer


class MultiheadAttention(AttentionLayer, LormaParameterLayer):
    """LoRMA on both weights of ``nn.MultiheadAttention``: query, key and value each on their own, and ``out_proj``."""

    inner_class = Linear
    blocks = 3

    def _matrices(self, weight: Tensor, side: Side) -> Tensor:
        return weight.unflatten(0, (3, -1))
