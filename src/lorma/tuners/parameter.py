"""Adapters on bare parameters, which no module of their own applies: stacked experts, nn.MultiheadAttention's inside.

The module that holds the parameter is run with ``W0 + ΔW`` in its place, so here the weight is read and formed in
each forward pass. The sum is rounded to the weight's dtype, as nothing else fits the module's own arithmetic: on a
base in bfloat16, updates below its precision do not act before they have grown.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lorma.tuners.layer import AdapterLayer


class ParameterLayer(nn.Module, AdapterLayer):
    """What layers on a bare parameter have in common: the module is run with the adapted parameter in its place."""

    kind: str

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, *, layer_name: str, parameter_name: str, **options: Any
    ) -> None:
        nn.Module.__init__(self)
        self.parameter_name = self.weight_name = parameter_name
        refuse_parametrized(base_layer, parameter_name, layer_name)
        super(nn.Module, self).__init__(base_layer, layer_name)  # the method's own layer, next in line
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, **options)

    def refuse(self, **options: Any) -> None:
        """Raise ``ValueError`` for an option that is set and needs the layer's own input and output."""
        for option, value in options.items():
            if value:
                raise ValueError(f"{option}={value!r} is not supported on {self.kind} ({self.layer_name})")

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        parameter = cast(Tensor, getattr(base_layer, self.parameter_name))
        return parameter.device, parameter.dtype

    def _refuse_mixed(self, adapter_names: list[str] | None) -> None:
        if adapter_names is not None:
            raise ValueError(f"{self.kind} ({self.layer_name}) does not support mixed batches (adapter_names)")


def refuse_parametrized(module: nn.Module, name: str, layer_name: str) -> None:
    """Raise ``ValueError`` if a weight is computed by ``torch.nn.utils.parametrize``.

    Putting an adapted one in its place would write to what it is computed from.
    """
    if parametrize.is_parametrized(module, name):
        raise ValueError(
            f"{layer_name}: {name} is computed by torch.nn.utils.parametrize and cannot be adapted as a parameter; "
            "remove the parametrization first (remove_parametrizations), or name a linear layer in target_modules"
        )


@contextmanager
def adapted(layer: AdapterLayer) -> Iterator[None]:
    """While active, the base layer's weight reads as the adapters that act make it.

    It is formed in at least the adapters' precision and rounded to the weight's dtype. The tensor lies in front of the
    parameter, as an attribute of the module itself; the parameter stays where it is, which is what FSDP and ZeRO-3
    need, as they keep account of it.
    """
    active = [] if layer.disable_adapters else layer.waiting_adapters()
    if not active:
        yield
        return
    layer.check_factors_loaded(active)
    module, name = layer.get_base_layer(), layer.weight_name
    stored = layer._parameter()
    weight = stored.to(torch.promote_types(stored.dtype, layer.adapter_dtype(active[0])))
    for adapter in active:
        weight = weight + layer.delta_weight_of(adapter, weight)
    hidden = vars(module).get(name)
    object.__setattr__(module, name, weight.to(stored.dtype))
    try:
        yield
    finally:
        del vars(module)[name]
        if hidden is not None:
            object.__setattr__(module, name, hidden)


class ParameterWrapper(ParameterLayer):
    """One 2-D (out × in) or 3-D (experts × out × in) parameter of any module.

    A module with ``is_transposed`` stores experts × in × out, as transformers has it. Several parameters of one module
    are wrapped inside each other. (PEFT recognises classes called ``ParamWrapper`` by their name.)
    """

    kind = "target_parameters"

    @property
    def _transposed(self) -> bool:
        return len(self._shape) == 3 and bool(getattr(self.get_base_layer(), "is_transposed", False))

    @property
    def _shape(self) -> tuple[int, ...]:
        parameter = getattr(self.get_base_layer(), self.parameter_name)
        return tuple(getattr(parameter, "ds_shape", parameter.shape))

    @property
    def blocks(self) -> int:  # type: ignore[override]
        """Number of experts, 1 for a plain matrix."""
        return self._shape[0] if len(self._shape) == 3 else 1

    def _features(self) -> tuple[int, int]:
        if len(self._shape) not in (2, 3):
            raise ValueError(
                f"target_parameters: {self.layer_name} has {len(self._shape)} dimensions; 2 (out × in) and 3 (experts "
                "× out × in) are supported"
            )
        out_features, in_features = self._shape[-2:] if not self._transposed else self._shape[:-3:-1]
        return self.blocks * in_features, self.blocks * out_features

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The wrapped module with its parameter adapted.

        Raises:
            ValueError: for mixed batches, which would need one weight for each row.
        """
        self._refuse_mixed(adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        with adapted(self):
            return self.base_layer(*args, **kwargs)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Called by PEFT when unloading: wrappers may be nested, and each merges its own parameter."""
        layer: Any = self
        while isinstance(layer, ParameterWrapper):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        return layer

    def __repr__(self) -> str:
        head, _, rest = super().__repr__().partition("(")
        return f"lorma.{head}(\n  parameter_name={self.parameter_name!r},{rest}"
