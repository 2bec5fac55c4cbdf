"""Adapters on nn.MultiheadAttention, which hands its weights to a kernel instead of calling a module."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from torch import nn

from lorma.tuners.layer import AdapterLayer
from lorma.tuners.parameter import ParameterLayer, adapted, refuse_parametrized


class AttentionLayer(ParameterLayer):
    """Both weights of ``nn.MultiheadAttention``: query, key and value in one parameter, and ``out_proj``.

    The attention is run with the adapted weights in place of its own.
    """

    kind = "nn.MultiheadAttention"
    inner_class: ClassVar[Any]
    """The method's linear layer, for ``out_proj``."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        *,
        layer_name: str,
        quantization: Any = None,
        **options: Any,
    ) -> None:
        if not cast(Any, base_layer)._qkv_same_embed_dim:
            raise ValueError(
                f"Target module {layer_name} is not supported: only the same embed_dim, kdim and vdim are, which "
                "nn.MultiheadAttention keeps in one weight"
            )
        super().__init__(base_layer, adapter_name, layer_name=layer_name, parameter_name="in_proj_weight", **options)
        out_proj = cast(nn.Module, base_layer.out_proj)
        refuse_parametrized(out_proj, "weight", f"{layer_name}.out_proj")
        inner = self.inner_class(out_proj, adapter_name, layer_name=f"{layer_name}.out_proj", **options)
        inner.pattern_name = layer_name
        base_layer.out_proj = inner

    def update_layer(self, adapter_name: str, *, config: Any, **options: Any) -> None:
        """As every layer's, for both weights."""
        super().update_layer(adapter_name, config=config, **options)
        if isinstance(self._out_proj, AdapterLayer):
            self._out_proj.update_layer(adapter_name, config=config, **options)

    @property
    def _out_proj(self) -> Any:
        return cast(Any, self.base_layer).out_proj

    def _features(self) -> tuple[int, int]:
        width = 3 * cast(Any, self.get_base_layer()).embed_dim
        return width, width

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The attention with both weights adapted.

        Raises:
            ValueError: for mixed batches, which would need one weight for each row.
        """
        self._refuse_mixed(adapter_names)
        for layer in (self, self._out_proj):
            if layer.disable_adapters and layer.merged:
                layer.unmerge()
        with adapted(self), adapted(self._out_proj):
            return self.base_layer(*args, **kwargs)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Called by PEFT when unloading: both weights are merged, and ``out_proj`` is unwrapped too."""
        if merge:
            for layer in (self, self._out_proj):
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        base: Any = self.base_layer
        base.out_proj = base.out_proj.base_layer
        return base

    def __getattr__(self, name: str) -> Any:
        """What the surrounding model asks of the attention (``batch_first``, ``num_heads``, …) is the base layer's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)
