"""Random matrices that any machine draws again, bit for bit.

A library's generator of normal numbers may give other bits on another processor, with other threads or in its next
release. These come from SHAKE-256, a standard hash with an output of any length: 32 bits make one uniform number, two
of those one pair of normal numbers (Box and Muller, 1958), computed in float64. ``log`` and ``cos`` may differ in their
last bit between processors, so normals are rounded to multiples of 2⁻¹⁶, some 10¹¹ times coarser: whether a number
lies so near to the middle between two multiples that it falls on the other side is a matter of 10⁻¹¹, and a checksum
tells.
"""

from __future__ import annotations

import hashlib
import json
import math

import torch
from torch import Tensor

GRID = 2.0**16


def standard_normal(seed: int, name: str, shape: tuple[int, int], label: str) -> Tensor:
    """Standard normal numbers, rounded to multiples of 2⁻¹⁶, that depend on the arguments alone.

    Args:
        seed: any integer.
        name: what the matrix belongs to, such as the path of a module.
        shape: of the matrix.
        label: which of several matrices of that name.

    Returns:
        float64 on the CPU, of ``shape``.
    """
    count = math.prod(shape)
    pairs = (count + 1) // 2
    key = json.dumps([seed, name, list(shape), label], ensure_ascii=True).encode()
    words = torch.frombuffer(bytearray(hashlib.shake_256(key).digest(8 * pairs)), dtype=torch.uint32)
    with torch.device("cpu"):
        uniform = (words.to(torch.float64) + 0.5) / 2.0**32
        radius = (-2.0 * uniform[:pairs].log()).sqrt()
        angle = (2.0 * math.pi) * uniform[pairs:]
        normal = torch.cat((radius * angle.cos(), radius * angle.sin()))[:count]
        return ((normal * GRID).round() / GRID).reshape(shape)


def checksum(*matrices: Tensor) -> bytes:
    """The first 8 bytes of the SHA-256 of the float32 numbers of ``matrices``; the same on every machine."""
    digest = hashlib.sha256()
    for matrix in matrices:
        numbers = matrix.detach().to("cpu", torch.float32).contiguous()
        digest.update(str(tuple(numbers.shape)).encode())
        digest.update(numbers.numpy().astype("<f4", copy=False).tobytes())
    return digest.digest()[:8]


def joint_checksum(checksums: list[bytes]) -> Tensor:
    """8 bytes that tell whether all of ``checksums`` are the same, then the first byte of each, to tell which is not.

    Returns:
        uint8 on the CPU, of shape (8 + number of checksums,).
    """
    together = hashlib.sha256(b"".join(checksums)).digest()[:8]
    return torch.tensor([*together, *(checksum[0] for checksum in checksums)], dtype=torch.uint8, device="cpu")
