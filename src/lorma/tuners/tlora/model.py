"""The TLoRA tuner."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lorma.tuners.kinds import from_pattern
from lorma.tuners.model import AdapterModel
from lorma.tuners.tlora.layer import TLoraLayer
from lorma.tuners.tlora.layers import KINDS, ParamWrapper

CHECKSUM = ".tlora_checksum"


class TLoraModel(AdapterModel):
    """A model whose layers carry TLoRA adapters; built by ``peft.get_peft_model``."""

    prefix = "tlora_"
    tuner_layer_cls = TLoraLayer
    kinds = KINDS
    parameter_class = ParamWrapper

    def layer_options(self, config: Any, target: nn.Module, name: str) -> dict[str, Any]:
        """The rank."""
        return {"r": from_pattern(config.rank_pattern, name, config.r)}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As every tuner's; the checksums of all A and C are put where the state dict finds them."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config: Any = self.peft_config[adapter_name]
        layers = _layers(model, adapter_name)
        if config.save_projection or not layers:
            return
        if any(layer.tlora_A[adapter_name].is_meta for layer in layers):
            found = torch.empty(len(layers), dtype=torch.int64, device="meta")
        else:
            found = torch.tensor([layer.projection_checksum(adapter_name) for layer in layers], device="cpu")
        layers[0].tlora_checksum.put(adapter_name, found, saved=True)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As every tuner's, after checking that A and C are those that the adapter was trained with.

        Raises:
            ValueError: naming the layer whose matrices come out otherwise here; or if the file holds no checksum.
        """
        stored = any(".tlora_A" in key for key in state_dict)
        if stored != config.save_projection:
            has = "holds" if stored else "does not hold"
            raise ValueError(
                f"the adapter's weights {has} the fixed matrices tlora_A and tlora_C, but its configuration says "
                f"save_projection={config.save_projection}"
            )
        if not stored:
            _verify(_layers(model, adapter_name), adapter_name, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _layers(model: nn.Module, adapter_name: str) -> list[TLoraLayer]:
    found = (module for module in model.modules() if isinstance(module, TLoraLayer))
    return [layer for layer in found if adapter_name in layer.undo]


def _verify(layers: list[TLoraLayer], adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    checksums = [value for key, value in state_dict.items() if CHECKSUM in key]
    if len(checksums) != 1 or checksums[0].dtype != torch.int64 or len(checksums[0]) != len(layers):
        raise ValueError(
            f"the adapter's weights must hold one tlora_checksum of {len(layers)} whole numbers, one for each adapted "
            "layer; without it nobody can tell whether its fixed matrices can be drawn again"
        )
    for layer, expected in zip(layers, cast(list[int], checksums[0].tolist()), strict=True):
        if layer.projection_checksum(adapter_name) != expected:
            raise ValueError(
                f"the fixed matrices A and C of {layer.layer_name} come out otherwise than those the adapter was "
                "trained with (another checksum), so it would compute something else here; was it trained with "
                "another seed or another version of lorma? An adapter saved with save_projection=True is not affected"
            )
