"""LoRMA on embeddings, on the embedding dimension."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorma import functional
from lorma.methods.lorma.tuner.channels import ChannelLayer
from lorma.tuners.devices import full_tensor, gathered


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

    def _is_plain(self, name: str, x: Tensor) -> bool:
        return self.inflation[name] == "plus" and super()._is_plain(name, x)

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Those of the transpose, ``(I + s·BA)ᵀ = I + s·AᵀBᵀ``."""
        return self.lorma_B[name].mT, self.lorma_A[name].mT

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
            weight = full_tensor(self.original_weight()).mT
            norms = functional.multiplied_row_norms(weight, B.mT, A.mT, self.scaling[adapter_name], "pre")
        return norms.to(A.device)
