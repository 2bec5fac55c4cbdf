"""LoRMA on nn.MultiheadAttention, which hands its weights to a kernel instead of calling a module."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from lorma.functional.multiplier import Side
from lorma.tuners.lorma.config import LormaConfig
from lorma.tuners.lorma.linear import Linear
from lorma.tuners.lorma.parameter import ParameterLayer, multiplied


class MultiheadAttention(ParameterLayer):
    """LoRMA on both weights of ``nn.MultiheadAttention``: query, key and value each on their own, and ``out_proj``.

    The attention is run with the multiplied weights in place of its own.
    """

    kind = "nn.MultiheadAttention"
    blocks = 3

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        *,
        layer_name: str,
        **options: Any,
    ) -> None:
        if not cast(Any, base_layer)._qkv_same_embed_dim:
            raise ValueError(
                f"Target module {layer_name} is not supported: only the same embed_dim, kdim and vdim are, which "
                "nn.MultiheadAttention keeps in one weight"
            )
        common: Any = {key: options[key] for key in ("r", "lorma_alpha", "config")}
        super().__init__(base_layer, adapter_name, layer_name=layer_name, parameter_name="in_proj_weight", **common)
        out_proj = cast(nn.Module, base_layer.out_proj)
        inner = Linear(out_proj, adapter_name, layer_name=f"{layer_name}.out_proj", **common)
        inner.pattern_name = layer_name
        base_layer.out_proj = inner

    def update_layer(
        self, adapter_name: str, r: int, lorma_alpha: float, config: LormaConfig, fused: Any = None
    ) -> None:
        """As every layer's, for both weights."""
        super().update_layer(adapter_name, r, lorma_alpha, config)
        if isinstance(self._out_proj, Linear):
            self._out_proj.update_layer(adapter_name, r, lorma_alpha, config)

    @property
    def _out_proj(self) -> Any:
        return cast(Any, self.base_layer).out_proj

    def _features(self) -> tuple[int, int]:
        width = 3 * cast(Any, self.get_base_layer()).embed_dim
        return width, width

    def _matrices(self, weight: Tensor, side: Side) -> Tensor:
        return weight.unflatten(0, (3, -1))

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The attention with both weights multiplied.

        Raises:
            ValueError: for mixed batches, which would need one weight for each row.
        """
        self._refuse_mixed(adapter_names)
        for layer in (self, self._out_proj):
            if layer.disable_adapters and layer.merged:
                layer.unmerge()
        with multiplied(self), multiplied(self._out_proj):
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

    def __repr__(self) -> str:
        return "lorma." + super().__repr__()
