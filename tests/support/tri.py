"""A case of TLoRA: the same kinds and features, another configuration and plain definition."""

from dataclasses import dataclass

import torch

from lorma import TLoraConfig
from lorma.functional import draw_projections
from support.case import Case
from support.kinds import KINDS

TALL = [kind for kind in KINDS if "fused_projections" not in kind.targets]
"""TLoRA takes a fused projection whole, like any linear layer."""
IN_OUT = ("Conv1D", "Embedding", "Experts, transposed")
"""Kinds that store their matrices as in × out."""


@dataclass(frozen=True)
class TriCase(Case):
    inflation: str = "tri-matrix"
    side: str = ""

    marker = "tlora_B"
    dropout_name = "tlora_dropout"
    starts_exactly = True
    ordered = False

    def config(self, **options):
        return TLoraConfig(**{"r": 2, "seed": 7, **self.kind.targets, **options})

    def parameters(self) -> int:
        return len(self.kind.parts) * (2 * 2 + 1)

    def same_settings(self, loaded, model) -> bool:
        return [layer.r for layer in self.layers(loaded)] == [layer.r for layer in self.layers(model)]

    def adapter(self, model, name="default"):
        return [(layer.tlora_B[name], layer.tlora_scale[name]) for layer in self.layers(model)]

    def plain_weights(self, *adapters):
        """Each weight with the updates of ``adapters`` added, entry by entry of the definition."""
        weights = super().plain_weights()
        for adapter in adapters:
            for (name, W), (B, scale) in zip(weights.items(), adapter, strict=True):
                weights[name] = W + self._update(name, W, B, scale)
        return weights

    def _update(self, name, W, B, scale):
        matrix = W.mT if self.kind.name in IN_OUT else W
        d = matrix.shape[0] if "Conv" in self.kind.name and W.ndim > 2 else matrix.shape[:-1].numel()
        k = W.numel() // d
        module = name if "target_parameters" in self.kind.targets else name.removesuffix(".weight")
        module = module.removesuffix(".in_proj_weight")
        A, C = (M.to(W.dtype) for M in draw_projections(7, module, d, k, len(B)))
        rows = [scale * sum(C[p, i] * (A @ B)[:, p] for p in range(len(B))) for i in range(d)]
        update = torch.stack(rows).reshape(matrix.shape)
        return update.mT if self.kind.name in IN_OUT else update
