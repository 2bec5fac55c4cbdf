"""Looking into ``adapter_model.safetensors`` without loading it."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

WEIGHTS_NAME = "adapter_model.safetensors"


def adapter_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a safetensors file, read from its header.

    Raises:
        ValueError: if the file is truncated or no safetensors file; the message names it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}); copy or save it again") from error


def check_adapter_folder(folder: Path) -> None:
    """Refuse a folder whose weights file is truncated or does not hold a LoRMA adapter; no file is no error.

    Raises:
        ValueError: naming the file and what it holds instead.
    """
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        return
    shapes = adapter_shapes(path)
    if not any(".lorma_A" in name for name in shapes):
        first = ", ".join(sorted(shapes)[:2]) or "nothing"
        raise ValueError(f"{path} holds no LoRMA weights (names with lorma_A and lorma_B); it holds {first}")
