"""Checkpoints in PyTorch's own format (``.bin``): never read, as a pickle can run any code; how to convert them."""

from __future__ import annotations

import shlex
from pathlib import Path

SAFE = ("model.safetensors", "model.safetensors.index.json")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def conversion_hint(path: str, revision: str | None = None) -> str:
    """What to say of a base model that has weights as ``.bin`` only; empty for every other one.

    The command that it gives reads the pickle, with torch's ``weights_only``, and writes safetensors: into the same
    folder, or for a hub name into a folder called like the model. Nothing is read here.

    Args:
        path: a local folder or a hub name.
        revision: of a hub repository.
    """
    found = next((name for name in PICKLED if _has(path, name, revision)), None)
    if found is None or any(_has(path, name, revision) for name in SAFE):
        return ""
    name = _class_name(path, revision)
    if Path(path).is_dir():
        code = f"import transformers as t; t.{name}.from_pretrained({path!r}).save_pretrained({path!r})"
        then = ""
    else:
        folder = path.rpartition("/")[2]
        named = ", ".join([repr(path), *([f"revision={revision!r}"] if revision else [])])
        parts = [f"t.{kind}.from_pretrained({named}).save_pretrained({folder!r})" for kind in (name, "AutoTokenizer")]
        code = "; ".join(["import transformers as t", *parts])
        then = f", and name the folder {folder}"
    return (
        f"it has {found} and no safetensors; a pickle is never read here. If you trust it, convert it: "
        f"python -c {shlex.quote(code)}{then}"
    )


def _has(path: str, name: str, revision: str | None) -> bool:
    from transformers.utils import has_file

    try:
        return bool(has_file(path, name, revision=revision))
    except OSError:
        return False


def _class_name(path: str, revision: str | None) -> str:
    """The class that the checkpoint was saved from, so that its head is converted as well."""
    import transformers

    try:
        config, _ = transformers.PreTrainedConfig.get_config_dict(path, revision=revision)
        name = (config.get("architectures") or ["AutoModel"])[0]
    except (OSError, ValueError, AttributeError, LookupError, TypeError):
        return "AutoModel"
    return name if isinstance(name, str) and name.isidentifier() and hasattr(transformers, name) else "AutoModel"
