"""Writing a safetensors file tensor by tensor, so that no more than one of them is in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from lorma.adapters.untrusted import DTYPES, TensorInfo

CODES = {dtype: code for code, dtype in DTYPES.items()}


def write_safetensors(path: Path, infos: dict[str, TensorInfo], tensors: Iterable[tuple[str, Tensor]]) -> int:
    """Write a file whose header says ``infos``, with tensors that come in that order.

    Returns: the bytes of the tensors.

    Raises:
        ValueError: a tensor is not what was announced, or one is missing.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in infos.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    awaited: Iterator[tuple[str, TensorInfo]] = iter(infos.items())
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            expected = next(awaited, (None, None))
            if expected != (name, TensorInfo(tuple(tensor.shape), tensor.dtype)):
                raise ValueError(f"{name} is {tuple(tensor.shape)} of {tensor.dtype}; {expected} was announced")
            file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            del tensor
    missing = next(awaited, None)
    if missing is not None:
        raise ValueError(f"{missing[0]} was announced and did not come")
    return end
