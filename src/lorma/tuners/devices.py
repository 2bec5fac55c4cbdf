"""Parameters that are not where they are used: offloaded by accelerate, partitioned by ZeRO-3, sharded by FSDP2."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn


def onloaded(modules: Iterable[nn.Module]) -> AbstractContextManager[Any]:
    """While active, parameters of these modules that accelerate has offloaded are on their execution device.

    Accelerate brings a module's parameters when the module is called; factors in a dictionary never are, nor is a base
    layer whose bias is read.
    """
    stack = None
    for module in modules:
        if is_offloaded(module) and any(p.is_meta for p in module.parameters(recurse=False)):
            stack = stack or ExitStack()
            stack.enter_context(align_module_device(module))
    return stack or nullcontext()


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """While active, the module's parameters are whole: brought if offloaded, gathered if partitioned by ZeRO-3.

    What a running forward pass has gathered already is left alone, as ZeRO-3 insists.
    """
    parts = [p for p in module.parameters() if hasattr(p, "ds_shape") and p.shape != p.ds_shape]
    with onloaded([module]), gather_params_ctx(parts):
        yield


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor sharded by FSDP2 put together, any other as it is."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, as FSDP2 makes them."""
    return torch.distributed.is_available() and isinstance(tensor, torch.distributed.tensor.DTensor)


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps the module's parameters elsewhere between calls."""
    return "_hf_hook" in vars(module) and has_offloaded_params(module)


def execution_device(module: nn.Module, device: torch.device | None) -> torch.device | None:
    """Where a module computes: ``device``, or what accelerate says if its parameters are away (on meta)."""
    if device is not None and device.type == "meta" and is_offloaded(module):
        found = cast(Any, module)._hf_hook.execution_device
        return torch.device(found) if found is not None else torch.device("cpu")
    return device
