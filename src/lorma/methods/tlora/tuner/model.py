"""The TLoRA tuner."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from lorma import functional
from lorma.methods.tlora.tuner.layer import TLoraLayer
from lorma.methods.tlora.tuner.layers import KINDS, ParamWrapper
from lorma.tuners.kinds import from_pattern
from lorma.tuners.model import AdapterModel
from lorma.tuners.names import PREFIX, unwrapped

CHECKSUM = ".tlora_checksum"
FIXED = re.compile(r"\.tlora_(A|C|checksum)\.")


class TLoraModel(AdapterModel):
    """A model whose layers carry TLoRA adapters; built by ``peft.get_peft_model``."""

    prefix = "tlora_"
    tuner_layer_cls = TLoraLayer
    kinds = KINDS
    parameter_class = ParamWrapper
    ties_targets = True

    def layer_options(self, config: Any, target: nn.Module, name: str) -> dict[str, Any]:
        """The rank."""
        return {"r": from_pattern(config.rank_pattern, name, config.r)}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As every tuner's; the checksums of all A and C are put where the state dict finds them."""
        if not self._load_state_dict_post_hooks:
            self.register_load_state_dict_post_hook(_verify_loaded)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config: Any = self.peft_config[adapter_name]
        layers = _layers(model, adapter_name)
        if config.save_projection or not layers:
            return
        if any(layer.tlora_A[adapter_name].is_meta for layer in layers):
            found = torch.empty(8 + len(layers), dtype=torch.uint8, device="meta")
        else:
            found = _checksum(layers, adapter_name)
        layers[0].tlora_checksum.put(adapter_name, found, saved=True)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What ``DistributedDataParallel`` need not send to all processes at each forward, being the same everywhere.

        It asks the model that it wraps, which is this one or the ``PeftModel`` around it.
        """
        fixed = [name for name, _ in self.named_buffers() if FIXED.search(name)]
        return [*fixed, *(f"base_model.{name}" for name in fixed)]

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As every tuner's, after checking that A and C are those that the adapter was trained with.

        Raises:
            ValueError: naming the layer whose matrices come out otherwise here; or if the file holds no checksum, or
                fixed matrices against the configuration.
        """
        layers = _layers(model, adapter_name)
        stored = sum(".tlora_A" in key or ".tlora_C" in key for key in state_dict)
        if stored != (2 * len(layers) if config.save_projection else 0):
            raise ValueError(
                f"the adapter's weights hold {stored} fixed matrices tlora_A and tlora_C for {len(layers)} adapted "
                f"layers, but its configuration says save_projection={config.save_projection}: it needs "
                f"{2 * len(layers) if config.save_projection else 'none'}"
            )
        if not stored:
            older = _older_names(cls._new_names(model, adapter_name, state_dict))
            _verify(layers, adapter_name, state_dict, older)
            if any(adapter_name in layer.drawn_as for layer in layers):
                state_dict = _with_projections(model, config, adapter_name, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _layers(model: nn.Module, adapter_name: str) -> list[TLoraLayer]:
    found = (module for module in model.modules() if isinstance(module, TLoraLayer))
    return [layer for layer in found if adapter_name in layer.undo]


def _checksum(layers: list[TLoraLayer], adapter_name: str) -> Tensor:
    return functional.joint_checksum([layer.projection_checksum(adapter_name) for layer in layers])


def _verify_loaded(tuner: Any, _: Any) -> None:
    """After a state dict is loaded without PEFT: its checksum must be that of the A and C that are here."""
    for name, config in tuner.peft_config.items():
        layers = _layers(tuner.model, name)
        if layers and not config.save_projection and name in layers[0].tlora_checksum:
            _verify(layers, name, {CHECKSUM: layers[0].tlora_checksum[name]})


def _with_projections(
    model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The weights with A and C in place of their checksum, as saved with ``save_projection``, which is set.

    For matrices that were drawn for names that the modules do not have any more: nobody could draw them again from a
    file with the names of now.
    """
    state_dict = {key: value for key, value in state_dict.items() if CHECKSUM not in key}
    for path, layer in model.named_modules():
        if not isinstance(layer, TLoraLayer) or adapter_name not in layer.undo:
            continue
        for name in layer.fixed_names:
            held = getattr(layer, name)
            held.put(adapter_name, held[adapter_name], saved=True)
            state_dict[f"{path}.{name}"] = held[adapter_name]
        if adapter_name in layer.tlora_checksum:
            del layer.tlora_checksum[adapter_name]
    config.save_projection = True
    return state_dict


def _older_names(new_names: dict[str, str]) -> dict[str, str]:
    """Names of layers in a file that the model has under another name, by that name."""
    keys = {new: old for old, new in new_names.items() if new != old and ".tlora_B" in new}
    return {_path(new): _path(old) for new, old in keys.items()}


def _path(key: str) -> str:
    return unwrapped(key).partition(".tlora_B")[0].removeprefix(PREFIX)


def _verify(
    layers: list[TLoraLayer],
    adapter_name: str,
    state_dict: dict[str, Tensor],
    older: dict[str, str] | None = None,
) -> None:
    found = [value for key, value in state_dict.items() if CHECKSUM in key]
    size = 8 + len(layers)
    if len(found) != 1 or found[0].dtype != torch.uint8 or found[0].shape != (size,):
        raise ValueError(
            f"the adapter's weights must hold one tlora_checksum of {size} bytes for its {len(layers)} adapted layers; "
            "without it nobody can tell whether its fixed matrices can be drawn again"
        )
    stated = found[0].cpu()
    if not torch.equal(stated, _checksum(layers, adapter_name)):
        for layer in layers:
            if layer.layer_name in (older or {}):
                layer.drawn_as[adapter_name] = (older or {})[layer.layer_name]
            layer.redraw(adapter_name)
    differs = (stated != _checksum(layers, adapter_name)).nonzero().flatten().tolist()
    if differs:
        names = [layers[i - 8].layer_name for i in differs if i >= 8]
        raise ValueError(
            f"the fixed matrices A and C of {names[0] if names else 'a layer'} come out otherwise than those the "
            "adapter was trained with (another checksum), so it would compute something else here; was it trained with "
            "another seed or another version of lorma, or on a module of another name? An adapter saved with "
            "save_projection=True is not affected"
        )
