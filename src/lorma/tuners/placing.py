"""Parameters that are not where they are used: offloaded by accelerate, partitioned by ZeRO-3, sharded by FSDP2."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn


@contextmanager
def in_place(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While active, parameters of these modules that accelerate has offloaded are on their execution device.

    Accelerate brings a module's parameters when the module is called; factors in a dictionary never are, nor is a base
    layer whose bias is read.
    """
    with ExitStack() as stack:
        for module in modules:
            away = hasattr(module, "_hf_hook") and has_offloaded_params(module)
            if away and any(p.is_meta for p in module.parameters(recurse=False)):
                stack.enter_context(align_module_device(module))
        yield


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """While active, the module's parameters are whole: brought if offloaded, gathered if partitioned by ZeRO-3.

    What a running forward pass has gathered already is left alone, as ZeRO-3 insists.
    """
    parts = [p for p in module.parameters() if hasattr(p, "ds_shape") and p.shape != p.ds_shape]
    with in_place([module]), gather_params_ctx(parts):
        yield


def whole(tensor: Tensor) -> Tensor:
    """A tensor sharded by FSDP2 put together, any other as it is."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, as FSDP2 makes them."""
    return torch.distributed.is_available() and isinstance(tensor, torch.distributed.tensor.DTensor)


def execution_device(module: nn.Module, device: torch.device | None) -> torch.device | None:
    """Where a module computes: ``device``, or what accelerate says if its parameters are away (on meta)."""
    if device is not None and device.type == "meta" and hasattr(module, "_hf_hook") and has_offloaded_params(module):
        found = cast(Any, module)._hf_hook.execution_device
        return torch.device(found) if found is not None else torch.device("cpu")
    return device
