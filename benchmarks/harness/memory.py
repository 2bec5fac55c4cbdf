"""Counting bytes, exactly rather than by sampling.

``saved_bytes`` counts what autograd keeps between forward and backward.
``peak_bytes`` is the largest sum of tensors alive during a run, less those alive before it: on a GPU as its allocator
counts it, on a CPU from the profiler's record of PyTorch's own allocations, which leaves out libraries' work space.
"""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import DEVICE, Run, synchronise
from lorma.kernels import rotation

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's remarks on starting and stopping


class _Kept:
    """The storage of a tensor that autograd has saved; goes when autograd lets go of it."""

    def __init__(self, tensor: Tensor) -> None:
        self.storage = tensor.untyped_storage()


def _no_backward(kept: Any) -> Tensor:
    raise RuntimeError("a graph whose bytes were counted keeps no tensors")


def saved_bytes(forward: Callable[[], Tensor], held: Iterable[Tensor]) -> int:
    """Bytes kept for the backward pass: distinct storages, without those of ``held`` (parameters, buffers).

    Counted are tensors saved through autograd and, where a hand-written function hangs them on its context instead,
    tensors found there.
    """
    saved: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def keep(tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        saved.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(keep, _no_backward):
        out = forward()
    storages = [kept.storage for kept in saved] + [tensor.untyped_storage() for tensor in _on_contexts(out)]
    own = {tensor.untyped_storage().data_ptr() for tensor in held}
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(size for pointer, size in sizes.items() if pointer not in own)


def _on_contexts(out: Tensor) -> Iterator[Tensor]:
    """Tensors among the attributes of hand-written functions' contexts, in the graph behind ``out``."""
    nodes, seen = [out.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        for value in getattr(node, "__dict__", {}).values():
            yield from (t for t in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(t, Tensor))


def peak_bytes(run: Run) -> int:
    """The most bytes of tensors alive at once during ``run``, beyond those alive before it.

    Work space that the kernels hold from one call to the next counts as made by ``run``.
    """
    run()
    rotation.drop_work_space()
    gc.collect()
    if DEVICE.type == "cuda":
        synchronise()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        synchronise()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    record: Any = profile.profiler
    events = [event for event in record.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak
