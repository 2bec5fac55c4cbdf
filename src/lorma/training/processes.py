"""The processes of a distributed run."""

from __future__ import annotations

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """Accelerate's view of this process among those that a launcher started; a lone process without a launcher.

    Without an accelerator the CPU has to be named, or Accelerate takes every process for a lone one.
    """
    return PartialState(cpu=not torch.accelerator.is_available())
