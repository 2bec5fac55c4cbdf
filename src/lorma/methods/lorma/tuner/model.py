"""The LoRMA tuner."""

from __future__ import annotations

import re
from typing import Any, cast

from torch import nn

from lorma.methods.lorma.tuner import weighted
from lorma.methods.lorma.tuner.dispatch import KINDS, fused_projection, rank_and_alpha
from lorma.methods.lorma.tuner.layer import LormaLayer
from lorma.methods.lorma.tuner.parameter import ParamWrapper
from lorma.tuners.model import AdapterModel
from lorma.tuners.targets import near_modules


class LormaModel(AdapterModel):
    """A model whose layers are multiplied by LoRMA adapters; built by ``peft.get_peft_model``."""

    prefix = "lorma_"
    tuner_layer_cls = LormaLayer
    kinds = KINDS
    parameter_class = ParamWrapper
    ties_targets = True

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Check what can be checked before the first layer is replaced."""
        super()._prepare_model(peft_config, model)
        for key in peft_config.fused_projections or {}:
            matching = [name for name, _ in model.named_modules() if re.match(rf"(.*\.)?({key})$", name)]
            if not matching:
                raise ValueError(
                    f"fused_projections names {key!r}, which this model does not have; {near_modules(model, [key])}"
                )

    def layer_options(self, config: Any, target: nn.Module, name: str) -> dict[str, Any]:
        """Rank, alpha and how a fused projection is cut."""
        r, lorma_alpha = rank_and_alpha(config, name)
        return {"r": r, "lorma_alpha": lorma_alpha, "fused": fused_projection(config, target, name)}

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "compose",
    ) -> None:
        """Make one LoRMA₊ adapter out of several.

        Args:
            adapters: their names; the first acts on W0 first.
            weights: a factor wᵢ for each adapter's update.
            adapter_name: name of the new adapter; nothing is done if it exists.
            combination_type: ``"compose"``, the exact product ``∏(I + wᵢsᵢ·BᵢAᵢ)`` of rank Σrᵢ, or ``"linear"``, a
                combination of the factors in the same rank, which only approximates it.

        Raises:
            ValueError: for unknown adapters, other inflations than plus, DoRA, or adapters on different sides.
        """
        if adapter_name in self.peft_config:
            return
        weighted.check_combination(self.model, self.peft_config, adapters, weights, combination_type)
        layers = [
            layer for layer in cast(list[LormaLayer], self._layers()) if any(name in layer.r for name in adapters)
        ]
        self.peft_config[adapter_name] = weighted.combined_config(self.peft_config, adapters, layers, combination_type)
        self.inject_adapter(self.model, adapter_name)
        for layer in layers:
            weighted.fill(layer, adapter_name, adapters, [float(w) for w in weights], combination_type)
            layer.set_requires_grad(adapter_name, False)
