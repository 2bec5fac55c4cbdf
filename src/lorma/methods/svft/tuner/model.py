"""The SVFT tuner."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from transformers.pytorch_utils import Conv1D

from lorma.methods.svft.tuner.layer import Linear, SvftLayer
from lorma.tuners.kinds import Kinds, from_pattern
from lorma.tuners.model import AdapterModel


class SvftModel(AdapterModel):
    """A model whose weights are changed in their singular bases; built by ``peft.get_peft_model``."""

    prefix = "svft_"
    tuner_layer_cls = SvftLayer
    kinds: ClassVar[Kinds] = {nn.Linear: Linear, Conv1D: Linear}

    def layer_options(self, config: Any, target: nn.Module, name: str) -> dict[str, Any]:
        return {"r": from_pattern(config.rank_pattern, name, config.r)}
