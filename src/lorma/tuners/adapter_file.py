"""Looking into ``adapter_model.safetensors`` without loading it."""

from __future__ import annotations

from collections.abc import Iterable
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


def check_adapter_folder(folder: Path, weights: tuple[str, ...]) -> None:
    """Refuse a folder whose weights file is truncated or holds another method's adapter; no file is no error.

    Args:
        weights: names that the method gives its weights.

    Raises:
        ValueError: naming the file and what it holds instead.
    """
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        return
    shapes = adapter_shapes(path)
    if weights and not any(f".{weight}" in name for name in shapes for weight in weights):
        first = ", ".join(sorted(shapes)[:2]) or "nothing"
        raise ValueError(f"{path} holds no weights named {' or '.join(weights)}; it holds {first}")


def check_known(places: set[str], found: Iterable[str], parts: tuple[str, ...]) -> None:
    """Refuse adapter weights that the adapted model has no place for, which PEFT would leave out without a word.

    Args:
        places: names in the model.
        found: names in the file, which may call the model ``base_model.model``.
        parts: names of the method's own parameters; others (biases, heads) are left to PEFT.

    Raises:
        ValueError: naming the weight.
    """
    prefix = "base_model.model."
    wrapped = any(name.startswith(prefix) for name in places)
    for key in found:
        name = key if wrapped else key.removeprefix(prefix)
        if any(f".{part}" in key for part in parts) and name not in places:
            raise ValueError(f"the adapter file holds {name}, which the adapted model does not have")
