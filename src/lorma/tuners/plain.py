"""What can be passed by: the call of a linear layer whose weight is at hand, a dropout that drops nothing."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

_KINDS, _WEIGHTS = (nn.Linear, Conv1D), (nn.Parameter, Tensor)


def drops(dropout: nn.Module | None) -> bool:
    """Whether an adapter's dropout does anything now; what is neither of PyTorch's two may."""
    return type(dropout) is not nn.Identity and (type(dropout) is not nn.Dropout or dropout.training)


def plain_weight(module: nn.Module) -> Tensor | None:
    """The weight of a linear layer if using it is the same as calling the module.

    It is not if the module is of another class, or somebody hooks into its call to bring, gather or change the weight
    (accelerate, FSDP, ZeRO-3, ``torch.nn.utils.parametrize``), or if the weight is no ordinary tensor.
    """
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    if hooked or type(module) not in _KINDS or "forward" in vars(module) or _has_any_global_hook():
        return None
    weight: Tensor | None = module._parameters.get("weight")
    if weight is None:
        weight = cast(Tensor, module.weight)
    if type(weight) not in _WEIGHTS or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return None
    return weight
