"""What the tuners of all methods share: which modules are replaced, merging and loading of whole models."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, onload_layer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, get_quantization_kwargs
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from lorma.adapters.folder import check_known
from lorma.tuners.batches import mixed_batch
from lorma.tuners.encoders import leave_fast_paths, return_to_fast_paths
from lorma.tuners.factors import leaf_of, without_leaf
from lorma.tuners.kinds import Kinds, check_fan_in_fan_out, check_mamba, layer_class
from lorma.tuners.layer import AdapterLayer
from lorma.tuners.merge_state import MergeReport, remember
from lorma.tuners.names import renamed, unwrapped
from lorma.tuners.parameter import ParameterWrapper
from lorma.tuners.quantized import keep_layout, log_requantization
from lorma.tuners.targets import no_match
from lorma.tuners.tying import check_no_bias, check_tokens_fit, plain_path, tied_modules


class AdapterModel(BaseTuner):
    """A model whose layers carry adapters of one method; built by ``peft.get_peft_model``."""

    tuner_layer_cls: type[AdapterLayer]
    target_module_mapping: dict[str, Any] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    kinds: ClassVar[Kinds]
    """The method's layer for each kind of module."""
    parameter_class: ClassVar[Any] = None
    """The method's layer for ``target_parameters``, where it has one."""
    ties_targets: ClassVar[bool] = False
    """Whether ``ensure_weight_tying`` can put one adapter on an embedding and what is tied to it."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in PEFT; target modules that match nothing are refused with the closest names there are."""
        self._new_adapter = adapter_name  # two adapters may have one configuration, as TRL's reference has
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            raise NoMatchingPeftModuleError(no_match(model, self.peft_config[adapter_name], error)) from None
        leave_fast_paths(model)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None and peft_config.target_parameters:
            peft_config.target_modules = set()
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Check what can be checked before the first layer is replaced; an older adapter of the same name goes."""
        keep_layout(model)
        _take_off(model, self._new_adapter)
        tied = self._get_module_names_tied_with_embedding()
        check_tokens_fit(model, peft_config, tied, lambda path: self._targets(peft_config, path))
        if peft_config.modules_to_tie:
            check_no_bias(model, peft_config.modules_to_tie, "ensure_weight_tying")

    def _targets(self, config: Any, path: str) -> bool:
        found = self._check_target_module_exists(config, path)
        return bool(found) or self._check_tied_module_exists(config, path) is True

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        """As in PEFT, by their paths in the base model also where they are wrapped."""
        return tied_modules(self.model, super()._get_module_names_tied_with_embedding())

    def _add_modules_to_save_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        """Of tied modules the input embedding is trained whole; the others follow it."""
        source = plain_path(_path_of(self.model, self.model.get_input_embeddings()))
        tied = tuple(tied_weight_keys)
        rest = [name for name in peft_config.modules_to_save if not any(path.endswith(name) for path in tied)]
        peft_config.modules_to_save = rest if source.endswith(tuple(rest)) else [*rest, source]
        peft_config.modules_to_tie = set(tied)

    def _add_targets_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        """Of tied modules the input embedding is adapted; the others get its adapter."""
        if not self.ties_targets or getattr(peft_config, "use_dora", False):
            what = "use_dora" if self.ties_targets else str(peft_config.peft_type.value)
            raise ValueError(
                f"ensure_weight_tying=True with {what} ties modules_to_save only; target_modules may name none of them"
            )
        source, targets = (
            plain_path(_path_of(self.model, self.model.get_input_embeddings())),
            peft_config.target_modules,
        )
        if isinstance(targets, str):
            matches = re.fullmatch(targets, source)
            peft_config.target_modules = targets if matches else f"(?:{targets})|{re.escape(source)}"
        else:
            rest = {name for name in targets if not any(f".{path}".endswith(f".{name}") for path in tied_weight_keys)}
            known = any(f".{source}".endswith(f".{name}") for name in rest)
            peft_config.target_modules = rest if known else {*rest, source}
        peft_config.target_modules_to_tie = set(tied_weight_keys)

    def _tie(self, layer: AdapterLayer, path: str, config: Any, adapter_name: str) -> None:
        if not self._check_tied_module_exists(config, path):
            return
        source: Any = self.model.get_input_embeddings()
        if not isinstance(source, AdapterLayer) or adapter_name not in source.undo:
            raise ValueError(
                f"ensure_weight_tying: {path} is tied to the embedding, which is left out of target_modules "
                "(exclude_modules, layers_to_transform)"
            )
        layer.tie(adapter_name, source)

    def layer_options(self, config: Any, target: nn.Module, name: str) -> dict[str, Any]:
        """What a layer's adapter is told besides its configuration, such as its rank.

        Args:
            target: the module, wrapped or not, or the one that holds the bare parameter ``name``.
        """
        raise NotImplementedError

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
        nested = isinstance(target, ParameterWrapper) and adapter_name in target.undo
        options = {"config": peft_config, **self.layer_options(peft_config, target, current_key)}
        if isinstance(target, self.tuner_layer_cls) and not nested:
            target.update_layer(adapter_name, **options)
            self._tie(target, current_key, peft_config, adapter_name)
            return
        if parameter_name is not None:
            if isinstance(target, nn.MultiheadAttention):
                raise ValueError(
                    f"target_parameters: {current_key} belongs to nn.MultiheadAttention; name it in target_modules"
                )
            layer: Any = self.parameter_class(
                target, adapter_name, layer_name=current_key, parameter_name=parameter_name, **options
            )
        else:
            cls = layer_class(self.kinds, target, current_key)
            check_fan_in_fan_out(peft_config, target, current_key)
            quantization = get_quantization_kwargs(self.model)
            layer = cls(target, adapter_name, layer_name=current_key, quantization=quantization, **options)
            layer.model_dtype = getattr(self.model, "dtype", None)
            self._tie(layer, current_key, peft_config, adapter_name)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: Any, child: nn.Module) -> None:
        """As in PEFT, but our layers need nothing done: they place their factors, and need not wrap a ``weight``."""
        if isinstance(child, (AdapterLayer, AuxiliaryTrainingWrapper)) or isinstance(new_module, AdapterLayer):
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
        tokens = [(layer, names) for layer in self._token_layers() if (names := _tokens_to_merge(layer, adapter_names))]
        for token_layer, names in tokens:
            token_layer._check_overlapping_tokens(names)
        if safe_merge:
            self._check_finite(adapter_names)
        reports: list[MergeReport | None] = []
        with ExitStack() as undoing:
            for layer in self._layers():
                with onload_layer(layer):
                    undoing.callback(_put_back, layer, remember(layer))
                    reports.append(layer.merge(safe_merge, adapter_names, undo=undo, quantized=quantized))
            for token_layer, names in tokens:
                undoing.callback(_put_tokens_back, token_layer, list(token_layer.merged_adapters))
                with onload_layer(token_layer):
                    token_layer.merge(safe_merge, names)
            undoing.pop_all()
        done = [report for report in reports if report is not None]
        log_requantization({r.layer: r.requantization_error for r in done})
        return done

    def unmerge_adapter(self) -> list[MergeReport]:
        """Unmerge every layer, in the way chosen when merging; one report for each layer that was merged."""
        reports = []
        for layer in reversed(self._layers()):
            with onload_layer(layer):
                reports.append(layer.unmerge())
        for token_layer in self._token_layers():
            if token_layer.merged:
                with onload_layer(token_layer):
                    token_layer.unmerge()
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
                layer.undo = dict.fromkeys(layer.undo, layer.merge_state.undo if layer.merged else "refuse")
                layer.reports_to = reports
            for token_layer in self._token_layers():
                token_layer._check_overlapping_tokens(_tokens_to_merge(token_layer, adapter_names))
            if safe_merge:
                self._check_finite(adapter_names)
        unload: Any = super()._unload_and_optionally_merge
        model = unload(merge, progressbar, safe_merge, adapter_names)
        return_to_fast_paths(model)
        log_requantization({r.layer: r.requantization_error for r in reports})
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        with mixed_batch(self.model, kwargs.get("adapter_names"), kwargs.get("num_beams")):
            yield

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        """Refuse what Mamba's fused kernels read without calling; PEFT's own check knows LoRA by name only."""
        check_mamba(str(peft_config.peft_type), model, target_name)

    def _layers(self) -> list[AdapterLayer]:
        return [module for module in self.model.modules() if isinstance(module, AdapterLayer)]

    def _token_layers(self) -> list[TrainableTokensLayer]:
        return [module for module in self.model.modules() if isinstance(module, TrainableTokensLayer)]

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
    def _get_adapter_state_dict(cls, model: nn.Module, config: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """As in PEFT, without what adapters of other methods in the same model have there."""
        others = tuple(
            f"{path}."
            for path, layer in model.named_modules()
            if isinstance(layer, BaseTunerLayer) and not isinstance(layer, cls.tuner_layer_cls)
        )
        state = super()._get_adapter_state_dict(model, config, *args, **kwargs)
        own = (f".{cls.prefix}", ".bias")
        return {key: value for key, value in state.items() if not key.startswith(others) or any(o in key for o in own)}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """As in PEFT: the name in an adapter file, ``….lorma_A`` for the model's ``….lorma_A.<adapter>.weight``.

        What wrappers put into the names of layers is taken out of those of their factors.
        """
        found = without_leaf(key, adapter_name, cls.tuner_layer_cls.tensor_names())
        plain = super()._remove_adapter_name_from_key(key, adapter_name) if found is None else found
        return unwrapped(plain) if f".{cls.prefix}" in plain else plain

    @classmethod
    def _new_names(cls, model: nn.Module, adapter_name: str, keys: Iterable[str]) -> dict[str, str]:
        """Names of an adapter's weights without wrappers and as the model's modules are called now, by those given."""
        plain = {key: unwrapped(key) if f".{cls.prefix}" in key else key for key in keys}
        known = {cls._remove_adapter_name_from_key(key, adapter_name) for key in model.state_dict()}
        new = renamed(model, plain.values(), known)
        return {key: new[name] for key, name in plain.items()}

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
        names = cls._new_names(model, adapter_name, state_dict)
        state_dict = {names[key]: value for key, value in state_dict.items()}
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        known = {unwrapped(key): key for key in model.state_dict()}
        remapped = {known.get(unwrapped(key), key): value for key, value in remapped.items()}
        places = {
            f"{path}.{factors}.{adapter_name}.{leaf_of(factors)}"
            for path, layer in model.named_modules()
            if isinstance(layer, AdapterLayer)
            for factors in layer.adapter_layer_names
            if adapter_name in getattr(layer, factors)
        }
        check_known(places, remapped, cls.tuner_layer_cls.adapter_layer_names)
        return remapped


def _take_off(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter off the layers and trained modules that have it, as ``get_peft_model`` left it there before."""
    for module in model.modules():
        if isinstance(module, AdapterLayer) and adapter_name in module.undo:
            module.set_adapter([name for name in module.active_adapters if name != adapter_name])
            module.delete_adapter(adapter_name)
        elif isinstance(module, AuxiliaryTrainingWrapper) and adapter_name in module._adapters:
            module.delete_adapter(adapter_name, [])


def _put_back(layer: AdapterLayer, put_back: Callable[[], None]) -> None:
    with onload_layer(layer):
        put_back()


def _tokens_to_merge(layer: TrainableTokensLayer, adapter_names: list[str] | None) -> list[str]:
    asked = layer.active_adapters if adapter_names is None else adapter_names
    known = [name for name in dict.fromkeys(asked) if name in layer.token_indices]
    return [name for name in known if name not in layer.merged_adapters]


def _put_tokens_back(layer: TrainableTokensLayer, merged: list[str]) -> None:
    """Take the adapters out that have been merged since ``merged`` were, whose rows are others."""
    now, layer.merged_adapters[:] = list(layer.merged_adapters), [n for n in layer.merged_adapters if n not in merged]
    if now != merged:
        layer.unmerge()
    layer.merged_adapters[:] = merged


def _path_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(path for path, module in model.named_modules() if module is wanted)
