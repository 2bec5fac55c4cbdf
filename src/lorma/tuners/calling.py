"""The forward pass of every layer that calls its base layer on an input and changes what comes out."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, cast

from torch import Tensor, nn

from lorma.tuners.devices import onloaded
from lorma.tuners.layer import AdapterLayer


class CallingLayer(nn.Module, AdapterLayer):
    """A layer around a base layer that is called: which adapters act, on which rows, and with weights at hand."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        *,
        layer_name: str,
        quantization: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        nn.Module.__init__(self)
        super(nn.Module, self).__init__(base_layer, layer_name, **quantization or {})  # the method's own layer
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, **options)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """The adapted layer. ``adapter_names`` names one adapter for each row of the batch (``"__base__"`` for none).

        Raises:
            ValueError: if ``adapter_names`` does not fit the batch, or adapters are merged.
        """
        if adapter_names is not None:
            self._check_adapter_names(x, adapter_names)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return cast(Tensor, self.base_layer(x, *args, **kwargs))
        if adapter_names is None:
            names = self.waiting_adapters()
            if len(names) == 1 and self._is_plain(names[0], x):
                return self._forward_alone(x, names[0], *args, **kwargs)
        else:
            names = [name for name in dict.fromkeys(adapter_names) if name in self.undo]
        with onloaded(self.factors()):
            if not x.is_meta:
                self.check_factors_loaded(names)
            if adapter_names is not None:
                return self._forward_mixed(x, adapter_names, *args, **kwargs)
            return self._forward_several(x, names, *args, **kwargs)

    @abstractmethod
    def _is_plain(self, name: str, x: Tensor) -> bool:
        """Whether ``_forward_alone`` can serve: the adapter's weights are at hand, and nothing else is in the way."""

    @abstractmethod
    def _forward_alone(self, x: Tensor, name: str, *args: Any, **kwargs: Any) -> Tensor:
        """One adapter for the whole batch, the quick way."""

    @abstractmethod
    def _forward_several(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Any number of adapters, all on the whole batch."""

    @abstractmethod
    def _forward_mixed(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """One adapter, or none, for each row of the batch."""

    def _check_adapter_names(self, x: Tensor, adapter_names: list[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def __repr__(self) -> str:
        return "lorma." + super().__repr__()
