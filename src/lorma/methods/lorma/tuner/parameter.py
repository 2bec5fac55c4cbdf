"""LoRMA on bare parameters; see :mod:`lorma.tuners.parameter`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lorma.functional.multiplier import Side
from lorma.methods.lorma.tuner.config import LormaConfig
from lorma.methods.lorma.tuner.layer import LormaLayer
from lorma.tuners.parameter import ParameterLayer, ParameterWrapper


class LormaParameterLayer(ParameterLayer, LormaLayer):
    """A bare parameter that is multiplied."""

    def update_layer(self, adapter_name: str, *, config: LormaConfig, **options: Any) -> None:
        """As every layer's; see :class:`LormaLayer`.

        Raises:
            ValueError: for dropout and DoRA, which need the layer's own input and output.
        """
        self.refuse(lorma_dropout=config.lorma_dropout, use_dora=config.use_dora)
        super().update_layer(adapter_name, config=config, **options)


class ParamWrapper(ParameterWrapper, LormaParameterLayer):
    """LoRMA on one 2-D or 3-D parameter of any module. Each expert has its own multiplier."""

    def _matrices(self, weight: Tensor, side: Side) -> Tensor:
        return weight.mT if self._transposed else weight
