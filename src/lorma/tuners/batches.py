"""Mixed batches: each row of a batch through an adapter of its own (``adapter_names=``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from lorma.tuners.layer import AdapterLayer
from lorma.tuners.row_groups import BASE


@contextmanager
def mixed_batch(model: nn.Module, adapter_names: list[str] | None, num_beams: Any = None) -> Iterator[None]:
    """While active, hand ``adapter_names`` to every layer of ``model`` that has adapters.

    With beam search each row is repeated for its beams, except in the encoder of an encoder-decoder model, which runs
    before that.

    Raises:
        TypeError: if ``adapter_names`` is no list of strings.
        ValueError: in training mode, or if a name is neither an adapter of this model nor ``"__base__"``.
    """
    if adapter_names is None:
        yield
        return
    if not isinstance(adapter_names, (list, tuple)) or not all(isinstance(name, str) for name in adapter_names):
        raise TypeError(f"adapter_names={adapter_names!r} must be a list of adapter names, one for each row")
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    layers = [m for m in model.modules() if isinstance(m, (AdapterLayer, AuxiliaryTrainingWrapper))]
    known = {name for layer in layers if isinstance(layer, AdapterLayer) for name in layer.undo}
    unknown = sorted(set(adapter_names) - known - {BASE})
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
    encoder: Any = cast(Any, model).get_encoder() if hasattr(model, "get_encoder") else None
    encoded = set() if encoder is None or encoder is model else set(encoder.modules())
    beams = num_beams if isinstance(num_beams, int) and num_beams > 1 else 1
    repeated = [name for name in adapter_names for _ in range(beams)]
    hooks = []
    try:
        for layer in layers:
            names = list(adapter_names) if layer in encoded else repeated
            if isinstance(layer, AuxiliaryTrainingWrapper):  # PEFT's know only the adapters that train something there
                names = [name if name in layer._get_available_adapters() else BASE for name in names]
            hooks.append(layer.register_forward_pre_hook(_Hand(names), with_kwargs=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Hand:
    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "adapter_names": self.names}
