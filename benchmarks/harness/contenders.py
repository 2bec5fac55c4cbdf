"""What is measured against what, by name, on any base model with linear layers.

=========================  ===========================================================================
``frozen``                 the base model alone, nothing trained: the floor
``lora``, ``dora``         PEFT's LoRA, without and with ``use_dora``
``hira``                   PEFT's HiRA, W0 ∘ (1 + BA)
``rebuild-plus``           I + BA formed in full every step, multiplied with W0; autograd does the rest
``rebuild-permutation``    likewise, BA rotated row by row through an n × n index
``lorma-plus``             LoRMA₊ on side pre; ``lorma-plus-post`` and ``lorma-plus-auto`` on other sides
``lorma-permutation``      LoRMAπ on side pre; ``lorma-permutation-auto`` on the narrower side
``tlora``                  TLoRA: r² + 1 numbers a layer
=========================  ===========================================================================

What is neither the base alone nor rebuilt is a method of the registry, or a variant of one; every other method with an
adapter can be named too. Scalings are 1 (alpha = r). All contenders on one base share its frozen weights. Each starts
at its method's own start, moved by noise in every factor, so that nothing is zero by chance. Rebuilding is our own
reference for the idea, on side pre: forming the multiplied weight in every step.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from lorma.functional import init_factors
from lorma.methods import get_method
from lorma.schema import AdapterSpec

ALL = (
    "frozen",
    "lora",
    "dora",
    "hira",
    "rebuild-plus",
    "rebuild-permutation",
    "lorma-plus",
    "lorma-plus-post",
    "lorma-plus-auto",
    "lorma-permutation",
    "lorma-permutation-auto",
    "tlora",
)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {"lorma-permutation-auto": ("lorma-permutation", {"side": "auto"})}
"""Contenders that are a method with other fields than its own."""
SLOW = {"dora": 3, "hira": 3, "rebuild-plus": 3}
"""Contenders that take part in every third round only: no close call depends on them."""
NOISE = 0.01


def configuration(name: str, targets: Sequence[str], r: int) -> Any:
    """The PEFT configuration of a contender: any method with an adapter, or a variant of one.

    Raises:
        InputError: if there is no such method.
    """
    name, further = VARIANTS.get(name, (name, {}))
    method = get_method(name)
    config = method.configure(AdapterSpec(r=r, target_modules=list(targets)), None, method.read_options({}))
    return replace(config, **further)


def build(name: str, base: nn.Module, targets: Sequence[str], r: int = 8) -> nn.Module:
    """A copy of ``base`` that shares its weights, with the contender's adapter on the target modules.

    Adapters are kept in the base's dtype.
    """
    torch.manual_seed(0)
    model: Any = shared_copy(base).requires_grad_(False)
    if name == "frozen":
        return model
    if name.startswith("rebuild-"):
        return _rebuild(model, targets, r, name.partition("-")[2])
    adapted = get_peft_model(model, configuration(name, targets, r), autocast_adapter_dtype=False)
    shake(adapted)
    return adapted


def build_many(name: str, base: nn.Module, targets: Sequence[str], count: int, r: int = 8) -> Any:
    """As :func:`build`, with ``count`` adapters named ``"0"``, ``"1"``, …, to predict with in mixed batches."""
    torch.manual_seed(0)
    model: Any = shared_copy(base).requires_grad_(False)
    names = [str(number) for number in range(count)]
    adapted = get_peft_model(model, configuration(name, targets, r), adapter_name=names[0])
    for further in names[1:]:
        adapted.add_adapter(further, configuration(name, targets, r))
    for each in names:
        adapted.set_adapter(each)
        shake(adapted)
    return adapted.requires_grad_(False).eval()


def inner(model: nn.Module) -> Any:
    """The model that was given to :func:`build`, as it is now, without PEFT's wrapper around it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are those of ``model``."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in held(model)})


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Add noise to the factors: every trainable matrix, whatever the method calls it."""
    for parameter in trainable(model):
        if parameter.ndim == 2:
            parameter.add_(NOISE * torch.randn_like(parameter))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The adapter's parameters."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def held(model: nn.Module) -> list[Tensor]:
    """What a model holds between steps: parameters and buffers."""
    return [*model.parameters(), *model.buffers()]


def counts(model: nn.Module, base: nn.Module) -> dict[str, int]:
    """Trained numbers, and bytes held between steps beside the base (layers of one width may share some)."""
    known = {tensor.data_ptr() for tensor in held(base)}
    added = {t.data_ptr(): t.untyped_storage().nbytes() for t in held(model) if t.data_ptr() not in known}
    return {"parameters": sum(p.numel() for p in trainable(model)), "held_bytes": sum(added.values())}


class Rebuilt(nn.Module):
    """A linear layer whose multiplied weight is formed in every step.

    Args:
        base_layer: d × k.
        r: rank of the factors A (r × d) and B (d × r).
        inflation: ``"plus"`` or ``"permutation"``.
    """

    index: Tensor | None

    def __init__(self, base_layer: nn.Linear, r: int, inflation: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        weight = base_layer.weight
        self.A = nn.Parameter(weight.new_empty(r, weight.shape[0]))
        self.B = nn.Parameter(weight.new_empty(weight.shape[0], r))
        init_factors(self.A, self.B, 1.0, inflation)
        index = rotation(len(weight), weight.device) if inflation == "permutation" else None
        self.register_buffer("index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weight, product, index = self.base_layer.weight, self.B @ self.A, self.index
        if index is None:
            multiplier = torch.eye(len(product), dtype=product.dtype, device=product.device) + product
        else:
            multiplier = product.gather(1, index)
        return F.linear(x, multiplier @ weight, self.base_layer.bias)


@lru_cache
def rotation(n: int, device: torch.device) -> Tensor:
    """The n × n index that rotates row i right by i; one for all layers of a width."""
    steps = torch.arange(n, device=device)
    return (steps - steps[:, None]) % n


def _rebuild(model: nn.Module, targets: Sequence[str], r: int, inflation: str) -> nn.Module:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets:
            model.set_submodule(name, Rebuilt(module, r, inflation))
    shake(model)
    return model
