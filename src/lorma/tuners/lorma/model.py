"""The LoRMA tuner: which modules of a model are adapted, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, onload_layer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, get_quantization_kwargs
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn

from lorma.tuners.adapter_file import check_known
from lorma.tuners.lorma import weighted
from lorma.tuners.lorma.batches import mixed_batch
from lorma.tuners.lorma.dispatch import check_fan_in_fan_out, check_mamba, fused_projection, layer_class, rank_and_alpha
from lorma.tuners.lorma.layer import LormaLayer
from lorma.tuners.lorma.parameter import ParamWrapper
from lorma.tuners.originals import MergeReport, remember
from lorma.tuners.quantized import keep_layout, tell_requantization
from lorma.tuners.targets import closest_modules


class LormaModel(BaseTuner):
    """A model whose layers are multiplied by LoRMA adapters; built by ``peft.get_peft_model``."""

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

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None and peft_config.target_parameters:
            peft_config.target_modules = set()
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Check what can be checked before the first layer is replaced."""
        keep_layout(model)
        for key in peft_config.fused_projections or {}:
            matching = [name for name, _ in model.named_modules() if re.match(rf"(.*\.)?({key})$", name)]
            if not matching:
                raise ValueError(
                    f"fused_projections names {key!r}, which this model does not have. Closest names in this model: "
                    f"{closest_modules(model, [key])}."
                )

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        if not config.target_parameters:
            return
        for name, other in self.peft_config.items():
            theirs = set(getattr(other, "target_parameters", None) or ())
            if other is not config and theirs and theirs != set(config.target_parameters):
                raise ValueError(
                    "all adapters with target_parameters must name the same ones, but the new adapter has "
                    f"{sorted(config.target_parameters)} and adapter {name!r} {sorted(theirs)}"
                )

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
        r, lorma_alpha = rank_and_alpha(peft_config, current_key)
        nested = isinstance(target, ParamWrapper) and adapter_name in target.lorma_A
        if isinstance(target, LormaLayer) and not nested:
            fused = fused_projection(peft_config, target, current_key) if parameter_name is None else None
            target.update_layer(adapter_name, r, lorma_alpha, peft_config, fused)
            return
        common: Any = {"layer_name": current_key, "r": r, "lorma_alpha": lorma_alpha, "config": peft_config}
        if parameter_name is not None:
            if isinstance(target, nn.MultiheadAttention):
                raise ValueError(
                    f"target_parameters: {current_key} belongs to nn.MultiheadAttention; name it in target_modules"
                )
            layer: Any = ParamWrapper(target, adapter_name, parameter_name=parameter_name, **common)
        else:
            cls: Any = layer_class(target, current_key)
            check_fan_in_fan_out(peft_config, target, current_key)
            fused = fused_projection(peft_config, target, current_key)
            layer = cls(target, adapter_name, fused=fused, **common, **get_quantization_kwargs(self.model))
            layer.model_dtype = getattr(self.model, "dtype", None)
        if isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0  # the ordinary path; the fast one would read weights past our layers
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: Any, child: nn.Module) -> None:
        """As in PEFT, but our layers need nothing done: they place their factors, and need not wrap a ``weight``."""
        if isinstance(child, LormaLayer) or isinstance(new_module, LormaLayer):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Adapters start in at least float32; PEFT's ``autocast_adapter_dtype=False`` takes the base layer's dtype."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        for layer in self._layers():
            _, dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
            if dtype is not None and dtype.is_floating_point:
                layer.cast_adapter(adapter_name, dtype)

    def merge_adapter(  # type: ignore[override]
        self,
        adapter_names: list[str] | None = None,
        safe_merge: bool = False,
        *,
        undo: str | None = None,
        quantized: str | None = None,
    ) -> list[MergeReport]:
        """Merge adapters in place; if one layer refuses, the layers before it are put back as they were.

        For that, whatever ``undo`` says, the old weights are kept until the call returns.

        Args:
            adapter_names: which adapters, in their order; None takes the active ones.
            safe_merge: refuse, before anything is changed, if a factor or a merged weight is not finite.
            undo, quantized: see :meth:`lorma.tuners.merge.MergeableLayer.merge`.

        Returns: one report for each layer that was merged.

        Raises:
            ValueError: as ``merge`` does; or if an active adapter that is left out acts before one that is merged.
        """
        self._check_merge_allowed()
        unknown = sorted(set(adapter_names or ()) - set(self.peft_config))
        if unknown:
            raise ValueError(f"adapter_names={adapter_names}: there is no adapter {', '.join(unknown)}")
        for layer in self._layers():
            layer.check_merge(adapter_names, undo, quantized)
        if safe_merge:
            self._check_finite(adapter_names)
        reports: list[MergeReport | None] = []
        with ExitStack() as undoing:
            for layer in self._layers():
                with onload_layer(layer):
                    undoing.callback(_put_back, layer, remember(layer))
                    reports.append(layer.merge(safe_merge, adapter_names, undo=undo, quantized=quantized))
            undoing.pop_all()
        done = [report for report in reports if report is not None]
        tell_requantization({r.layer: r.requantization_error for r in done})
        return done

    def unmerge_adapter(self) -> list[MergeReport]:
        """Unmerge every layer, in the way chosen when merging; one report for each layer that was merged."""
        reports = []
        for layer in reversed(self._layers()):
            with onload_layer(layer):
                reports.append(layer.unmerge())
        return [report for report in reports if report is not None]

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        *,
        quantized: str | None = None,
    ) -> nn.Module:
        """The base model with adapters merged and all wrappers taken off.

        ``quantized`` is for quantised base layers; see :meth:`lorma.tuners.merge.MergeableLayer.merge`.
        """
        layers = self._layers()
        try:
            for layer in layers:
                layer.quantized_merge = quantized
            return self._unload_and_optionally_merge(True, progressbar, safe_merge, adapter_names)
        finally:
            for layer in layers:
                layer.quantized_merge = None

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        reports: list[MergeReport] = []
        if merge:
            layers = self._layers()
            for layer in layers:
                layer.check_merge(adapter_names, None if layer.merged else "refuse", None, unload=True)
            for layer in layers:
                layer.undo = dict.fromkeys(layer.undo, layer._undo if layer.merged else "refuse")
                layer.reports_to = reports
            if safe_merge:
                self._check_finite(adapter_names)
        unload: Any = super()._unload_and_optionally_merge
        model = unload(merge, progressbar, safe_merge, adapter_names)
        tell_requantization({r.layer: r.requantization_error for r in reports})
        return model

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
        layers = [layer for layer in self._layers() if any(name in layer.r for name in adapters)]
        self.peft_config[adapter_name] = weighted.combined_config(self.peft_config, adapters, layers, combination_type)
        self.inject_adapter(self.model, adapter_name)
        for layer in layers:
            weighted.fill(layer, adapter_name, adapters, weights, combination_type)
            layer.set_requires_grad(adapter_name, False)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        with mixed_batch(self.model, kwargs.get("adapter_names"), kwargs.get("num_beams")):
            yield

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        """Refuse what Mamba's fused kernels read without calling; PEFT's own check knows LoRA by name only."""
        check_mamba(model, target_name)

    def _layers(self) -> list[LormaLayer]:
        return [module for module in self.model.modules() if isinstance(module, LormaLayer)]

    def _check_finite(self, adapter_names: list[str] | None) -> None:
        for layer in self._layers():
            for name in adapter_names or layer.active_adapters:
                for factors in layer.adapter_layer_names:
                    held = getattr(layer, factors)
                    if name in held and not torch.isfinite(held[name]).all():
                        raise ValueError(
                            f"NaNs detected in {factors} of {layer.layer_name}. The adapter {name} seems to be broken"
                        )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As in PEFT, after checking that every factor in the file has a place in the model.

        Raises:
            ValueError: naming the factor. Missing ones and other shapes are left to PEFT, which reports them, or puts
                up with them if told to (``ignore_mismatched_sizes``).
        """
        if "disk" in getattr(model, "hf_device_map", {}).values():
            raise ValueError(
                "the base model lies partly on disk, where PEFT can add LoRA weights only; load it without disk "
                "offload, add the adapter, then call accelerate's dispatch_model"
            )
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        places = {
            f"{path}.{factors}.{adapter_name}"
            for path, layer in model.named_modules()
            if isinstance(layer, LormaLayer)
            for factors in layer.adapter_layer_names
            if adapter_name in getattr(layer, factors)
        }
        check_known(places, remapped, LormaLayer.adapter_layer_names)
        return remapped


def _put_back(layer: LormaLayer, put_back: Callable[[], None]) -> None:
    with onload_layer(layer):
        put_back()
