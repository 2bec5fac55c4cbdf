"""The LoRMA tuner: which modules of a model are adapted, and what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, onload_layer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from lorma.tuners.lorma.layer import Linear, LormaLayer
from lorma.tuners.targets import closest_modules

MAMBA_MODEL_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
MAMBA_FUSED_MODULES = ("out_proj", "conv1d")


class LormaModel(BaseTuner):
    """A model whose linear layers are multiplied by LoRMA adapters; built by ``peft.get_peft_model``."""

    prefix = "lorma_"
    tuner_layer_cls = LormaLayer
    target_module_mapping: dict[str, Any] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in PEFT; target modules that match nothing are refused with the closest names there are."""
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            config: Any = self.peft_config[adapter_name]
            targets = config.target_modules or ()
            near = closest_modules(model, [targets] if isinstance(targets, str) else sorted(targets))
            raise NoMatchingPeftModuleError(f"{error} Closest names in this model: {near}.") from None

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        r_key = get_pattern_key(list(peft_config.rank_pattern), current_key)
        alpha_key = get_pattern_key(list(peft_config.alpha_pattern), current_key)
        r = peft_config.rank_pattern.get(r_key, peft_config.r)
        lorma_alpha = peft_config.alpha_pattern.get(alpha_key, peft_config.lorma_alpha)
        if isinstance(target, LormaLayer):
            target.update_layer(adapter_name, r, lorma_alpha, peft_config)
            return
        _check_supported(target, current_key)
        if peft_config.fan_in_fan_out and not isinstance(target, Conv1D):
            warnings.warn(
                f"fan_in_fan_out is set to True but {current_key} is a {type(target).__name__}, which stores its "
                "weight as out x in; it is ignored there.",
                stacklevel=2,
            )
        layer = Linear(target, adapter_name, layer_name=current_key, r=r, lorma_alpha=lorma_alpha, config=peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Adapters start in at least float32; PEFT's ``autocast_adapter_dtype=False`` takes the base layer's dtype."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        for layer in self._layers():
            _, dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
            if dtype is not None and dtype.is_floating_point:
                layer.cast_adapter(adapter_name, dtype)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters in place. If one layer refuses, the layers before it are put back as they were."""
        if safe_merge:
            self._check_finite(adapter_names)
        before = [(layer, list(layer.merged_adapters)) for layer in self._layers()]
        try:
            super().merge_adapter(adapter_names, safe_merge=safe_merge)
        except Exception:
            for layer, names in reversed(before):
                if layer.merged_adapters != names:
                    layer.unmerge()
                    layer.merge(adapter_names=names)
            raise

    def unmerge_adapter(self) -> None:
        """Unmerge every layer, the last one first: layers may share one weight, and then the order matters."""
        for layer in reversed(self._layers()):
            with onload_layer(layer):
                layer.unmerge()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge and safe_merge:
            self._check_finite(adapter_names)
        unload: Any = super()._unload_and_optionally_merge
        return unload(merge, progressbar, safe_merge, adapter_names)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError("adapter_names: a batch of several adapters is not supported yet")
        yield

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        """Refuse what Mamba's fused kernels read without calling; PEFT's own check knows LoRA by name only."""
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if model_type in MAMBA_MODEL_TYPES and target_name in MAMBA_FUSED_MODULES:
            raise ValueError(
                f"[PEFT:LORMA] Module '{target_name}' is incompatible with Mamba-based models "
                f"(model_type='{model_type}'): its weight is read without calling it. "
                "Please remove it from `target_modules`."
            )

    def _layers(self) -> list[LormaLayer]:
        return [module for module in self.model.modules() if isinstance(module, LormaLayer)]

    def _check_finite(self, adapter_names: list[str] | None) -> None:
        for layer in self._layers():
            for name in adapter_names or layer.active_adapters:
                for factors in ("lorma_A", "lorma_B"):
                    held = getattr(layer, factors)
                    if name in held and not torch.isfinite(held[name]).all():
                        raise ValueError(
                            f"NaNs detected in {factors} of {layer.layer_name}. The adapter {name} seems to be broken"
                        )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As in PEFT, after checking that every factor in the file has a place of its shape in the model.

        Raises:
            ValueError: naming the layer, the expected and the found shape. Factors that are *missing* are left to PEFT,
                which reports them: setting a part of an adapter's state is allowed.
        """
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        places = {
            f"{path}.{factors}.{adapter_name}": tuple(getattr(layer, factors)[adapter_name].shape)
            for path, layer in model.named_modules()
            if isinstance(layer, LormaLayer)
            for factors in ("lorma_A", "lorma_B")
            if adapter_name in getattr(layer, factors)
        }
        prefix = "base_model.model."
        wrapped = any(name.startswith(prefix) for name in places)
        for key, tensor in remapped.items():
            if ".lorma_A" not in key and ".lorma_B" not in key:
                continue
            name = key if wrapped else key.removeprefix(prefix)
            if name not in places:
                raise ValueError(f"the adapter file holds {name}, which the adapted model does not have")
            if tuple(tensor.shape) != places[name]:
                raise ValueError(
                    f"the adapter does not fit the base model: {name} should have shape {places[name]}, "
                    f"found {tuple(tensor.shape)}"
                )
        return remapped


def _check_supported(target: nn.Module, name: str) -> None:
    if isinstance(target, NonDynamicallyQuantizableLinear):
        raise ValueError(
            f"Target module {name} belongs to nn.MultiheadAttention, which reads its weight without calling it; "
            "LoRMA on nn.MultiheadAttention is not supported."
        )
    if not isinstance(target, (nn.Linear, Conv1D)):
        raise ValueError(
            f"Target module {name} ({type(target).__name__}) is not supported. Currently, only the following modules "
            "are supported: `torch.nn.Linear`, `transformers.pytorch_utils.Conv1D`."
        )
