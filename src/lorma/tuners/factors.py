"""Adapters' tensors, under the names that host libraries look for.

PEFT keeps LoRA's factors in one small module for each adapter, so a parameter is called ``….lora_A.<adapter>.weight``,
and host libraries rely on that shape: TRL makes its reference adapter by copying what has ``.default.`` in its name.
Ours are registered alike, ``….lorma_A.<adapter>.weight``. In adapter files the adapter and the leaf are left out
(``….lorma_A``).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

WEIGHT = "weight"
MAGNITUDE = "lora_magnitude_vector"
"""The leaf of DoRA's magnitudes: TRL rounds the trained parameters of quantised models to bfloat16 except those with
this in their name, whose steps would be lost in the rounding."""


class Factor(nn.Module):
    """One tensor of one adapter: a parameter, or a buffer that is part of the state dict or not."""


class Factors(nn.ParameterDict):
    """Tensors by adapter name, each registered as ``<adapter>.<leaf>``.

    A dictionary from names to tensors. What is no parameter becomes a buffer, unless it takes the place of a parameter.

    Args:
        leaf: what the tensor is called in the module of its adapter.
    """

    def __init__(self, leaf: str = WEIGHT) -> None:
        super().__init__()
        self.leaf = leaf

    def __getitem__(self, key: str) -> Any:
        return getattr(self._modules[key], self.leaf)

    def __setitem__(self, key: str, value: Tensor) -> None:
        if key not in self and not isinstance(value, nn.Parameter):
            self.put(key, value, saved=True)
            return
        factor = self._modules[key] if key in self else self._new(key)
        if not isinstance(value, nn.Parameter) and isinstance(old := self[key], nn.Parameter):
            value = nn.Parameter(value, old.requires_grad)
        setattr(factor, self.leaf, value)

    def put(self, key: str, tensor: Tensor, *, saved: bool) -> None:
        """Hold ``tensor`` under ``key`` as a buffer; ``saved``: in the state dict as well."""
        self._new(key).register_buffer(self.leaf, tensor, persistent=saved)

    def share(self, key: str, other: Factors) -> None:
        """Hold what ``other`` holds under ``key``: one tensor, whatever becomes of it, under two names."""
        self._modules[key] = other._modules[key]
        self._keys[key] = None

    def is_saved(self, key: str) -> bool:
        """Whether the tensor is part of the state dict."""
        return self.leaf not in self._modules[key]._non_persistent_buffers_set  # type: ignore[union-attr]

    def _new(self, key: str) -> Factor:
        factor = Factor()
        self._modules[key] = factor  # not add_module, which refuses adapters that are called as a method of this class
        self._keys[key] = None
        return factor

    def __delitem__(self, key: str) -> None:
        del self._keys[key]
        del self._modules[key]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """As every module's; whole state dicts of earlier versions have no leaf in their names."""
        for key in self:
            if isinstance(state_dict.get(prefix + key), Tensor):
                state_dict[f"{prefix}{key}.{self.leaf}"] = state_dict.pop(prefix + key)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def leaf_of(factors: str) -> str:
    """The leaf of the parameters in the dictionary of this name."""
    return MAGNITUDE if factors.endswith("magnitude_vector") else WEIGHT


def without_leaf(key: str, adapter_name: str, names: tuple[str, ...]) -> str | None:
    """``….lorma_A`` for ``….lorma_A.<adapter_name>.weight``, or None if it is in none of ``names``."""
    for name in names:
        end = f".{name}.{adapter_name}.{leaf_of(name)}"
        if key.endswith(end):
            return f"{key.removesuffix(end)}.{name}"
    return None
