"""Peak memory of this process."""

from __future__ import annotations

import resource
import sys

import torch


def reset_peak_memory() -> None:
    """Start counting anew where the device allows it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int:
    """Bytes: the most GPU memory allocated since the last reset, or without a GPU the process's peak resident size."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
