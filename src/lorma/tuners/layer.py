"""What every adapter layer has, whatever its method and whatever it wraps.

Factors are kept in at least float32 until PEFT is told otherwise (``autocast_adapter_dtype=False``); the update is
computed in their dtype and the sum returned in the base layer's output dtype.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from torch import Tensor, nn

from lorma.tuners.devices import execution_device
from lorma.tuners.merge import MergeableLayer
from lorma.tuners.quantized import quantization_backend


class AdapterLayer(MergeableLayer):
    """Base of the layers of all methods.

    Attributes, each keyed by adapter name: what ``adapter_layer_names`` lists (trained), what ``fixed_names`` lists
    (tensors that are not trained), and ``undo``, which every adapter that the layer has is in.
    """

    fixed_names: tuple[str, ...] = ()
    """Dictionaries of tensors that belong to adapters and are not trained."""
    blocks = 1
    """How many matrices of one shape the weight holds: groups of a convolution, experts."""

    def __init__(self, base_layer: nn.Module, layer_name: str, **quantization_kwargs: Any) -> None:
        self.base_layer = base_layer
        self.layer_name = self.pattern_name = layer_name
        self.undo: dict[str, str] = {}
        self._disable_adapters = False
        self.cast_input_dtype_enabled = True
        self.merged_adapters: list[str] = []
        self.quantization_backend = quantization_backend(self.get_base_layer(), **quantization_kwargs)
        self.in_features, self.out_features = self._features()
        self.twins: dict[str, list[MergeableLayer]] = {}

    def _features(self) -> tuple[int, int]:
        return cast(tuple[int, int], _get_in_out_features(self.get_base_layer()))

    def update_layer(self, adapter_name: str, *args: Any, **options: Any) -> None:
        """Add an adapter, or replace the one of this name, with ``config`` and the model's ``layer_options``."""
        raise NotImplementedError

    def tie(self, adapter_name: str, source: Any) -> None:
        """Make an adapter that of ``source``, an embedding whose weight this layer has as well."""
        if self._parameter() is source._parameter():
            others = [source, *source.twins.get(adapter_name, ())]
            self.twins[adapter_name] = others
            for other in others:
                other.twins.setdefault(adapter_name, []).append(self)

    @abstractmethod
    def lora_form_of(self, adapter_name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        """One adapter as a LoRA of scaling 1, exactly: ``ΔW = B'A'`` with A' (r' × k) and B' (d × r').

        Args:
            weight: the base weight W0 in the layout in which the base layer stores it. A convolution's kernel counts
                as d × (k · positions), an embedding as V × D.

        Raises:
            ValueError: if the adapter is no low-rank update of one matrix; the message says why.
        """

    def _tensors(self, adapter_name: str) -> Iterator[tuple[Any, Tensor]]:
        """The tensors of one adapter, each with the dictionary that holds it."""
        for name in (*self.adapter_layer_names, *self.fixed_names):
            held = getattr(self, name)
            if adapter_name in held:
                yield held, held[adapter_name]

    @classmethod
    def tensor_names(cls) -> tuple[str, ...]:
        """Names of the dictionaries of tensors, trained and fixed."""
        return (*cls.adapter_layer_names, *cls.fixed_names)

    def factors(self) -> list[nn.Module]:
        """The modules that hold the tensors of all adapters."""
        return [factor for name in self.tensor_names() for factor in getattr(self, name)._modules.values()]

    def adapter_dtype(self, adapter_name: str) -> torch.dtype:
        """What the factors of an adapter are held in."""
        return next(self._tensors(adapter_name))[1].dtype

    def _start_dtype(self) -> torch.dtype:
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        known = dtype is not None and dtype.is_floating_point and dtype.itemsize > 1
        return torch.promote_types(dtype, torch.float32) if known else torch.float32

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move one adapter to the base layer's device. Its dtype stays: rounding is not a matter of place."""
        base = self.get_base_layer()
        target = execution_device(base, device or self._get_base_layer_device_and_dtype(base)[0])
        for held, tensor in list(self._tensors(adapter_name)):
            if target is not None and not tensor.is_meta:
                moved = tensor.data.to(target)
                held[adapter_name] = (
                    nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved
                )

    def cast_adapter(self, adapter_name: str, dtype: torch.dtype) -> None:
        """Cast the factors of one adapter to ``dtype``."""
        for _, tensor in self._tensors(adapter_name):
            tensor.data = tensor.data.to(dtype)

    def check_factors_loaded(self, names: list[str]) -> None:
        """Refuse factors without memory (meta), with which PyTorch would compute from whatever lies around.

        Raises:
            RuntimeError: naming the adapter.
        """
        for name in names:
            if any(tensor.is_meta for _, tensor in self._tensors(name)):
                raise RuntimeError(
                    f"adapter {name!r} of {self.layer_name} has no weights yet (low_cpu_mem_usage=True makes it on the "
                    "meta device); load them before the forward pass"
                )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """``get_delta_weight`` is what an adapter adds to the weight, which PEFT's converter factorises."""
        return True
