"""Which base model a finished run or an adapter folder belongs to, without loading it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorma.adapters.folder import CONFIG_NAME, read_config
from lorma.adapters.untrusted import read_json
from lorma.errors import InputError, one_line, reading
from lorma.files import META_FILE
from lorma.models.load import load_tokenizer
from lorma.models.settled import read_settled
from lorma.models.source import Source, find_model
from lorma.runs.directory import RunDirectory
from lorma.schema import ModelSpec
from lorma.tasks import CausalLM, get_task

MAX_LABELS = 10_000
MAX_TOKENS = 1 << 20
"""Bounds on what a folder may say about its task, so that it cannot ask for any amount of memory."""


def base_arguments(folder: Path, base: str | None = None, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """The fields of :class:`lorma.export.Base` for an adapter folder.

    What ``lorma train`` wrote beside the adapter is asked first, then the adapter's configuration.

    Args:
        folder: the adapter folder.
        base: another base model than the recorded one: an alias, a directory, a GGUF file or a hub name.
        trust_remote_code: let the base model's repository run its own Python.

    Raises:
        InputError: no base model is recorded, or the recorded one was quantised and ``base`` is not given.
    """
    spec, fields = _recorded(folder)
    if base is not None:
        spec = named_base(base)
    elif spec is None:
        raise InputError(f"{folder} does not say which base model it belongs to; name it (--base)")
    elif spec.quantization:
        raise InputError(
            f"{folder} was trained on {spec.name!r} in {spec.quantization}; say which weights the result is for: "
            f"--base {spec.name} takes those in full precision"
        )
    spec = spec.model_copy(update={"trust_remote_code": trust_remote_code})
    key = "base_model_name_or_path" if fields is None else "model.name"
    source = find_base(folder, spec, named=base is not None, key=key)
    arguments: dict[str, Any] = {
        "path": source.path,
        "gguf_file": source.gguf_file,
        "revision": source.revision,
        "trust_remote_code": trust_remote_code,
    }
    if fields is not None:
        task = get_task(fields["task"])
        # Language models are used as published; only the others need the tokenizer, which costs time in a GGUF file.
        kwargs = {} if isinstance(task, CausalLM) else task.model_kwargs(fields, load_tokenizer(spec))
        settled = read_settled(folder)
        arguments |= {
            "auto_model": task.auto_model,
            "model_kwargs": kwargs,
            "pad_token": settled.pad_token,
            "stop_tokens": settled.stop_tokens,
            "load_kwargs": settled.load,
        }
    return arguments


def named_base(base: str) -> ModelSpec:
    """The model that ``--base`` names: an alias, a directory, a GGUF file or a hub name."""
    file = Path(base).expanduser()
    packed = file.name if file.is_file() and file.suffix == ".gguf" else None
    return ModelSpec(name=str(file.parent) if packed else base, gguf_file=packed)


def find_base(folder: Path, spec: ModelSpec, *, named: bool, key: str = "model.name") -> Source:
    """Where the base model of an adapter folder is loaded from.

    Args:
        folder: the adapter folder.
        spec: the base model that is recorded, or that ``--base`` names.
        named: whether ``--base`` names it.
        key: what the name is recorded under, for the message.

    Raises:
        InputError: there is no such model; the message says what to do with ``--base``.
    """
    try:
        return find_model(spec.name, spec.gguf_file, spec.revision)
    except InputError as error:
        if named:
            message = str(error).replace("model.name", "--base", 1)
        else:
            message = f"{folder}: {str(error).replace('model.name', key, 1)}; name the base model with --base"
        raise InputError(message) from None


@reading()
def finished_adapter(path: str | Path) -> Path:
    """The adapter folder that ``path`` is, or that the run directory ``path`` holds.

    Raises:
        InputError: it is neither or may not be read, or the run is unfinished or trained without an adapter.
    """
    folder = Path(path).expanduser()
    run = RunDirectory(folder)
    if run.recipe_file.is_file():
        if not run.finished:
            raise InputError(f"{folder} is an unfinished run; `lorma train` with its recipe goes on with it")
        folder = run.adapter
        if run.model.is_dir():
            raise InputError(f"{run.path} trained the whole model; it has no adapter")
    if not (folder / CONFIG_NAME).is_file():
        raise InputError(f"{str(path)!r} is neither a run directory nor an adapter folder: it has no {CONFIG_NAME}")
    return folder


def _recorded(folder: Path) -> tuple[ModelSpec | None, dict[str, Any] | None]:
    """The base model and the description of the data that belong to an adapter folder, as far as they are recorded."""
    if (folder / META_FILE).is_file():
        return read_meta(folder)
    config: Any = read_config(folder)
    name = config.base_model_name_or_path
    return (ModelSpec(name=name, revision=config.revision) if name else None), None


def read_meta(folder: Path) -> tuple[ModelSpec, dict[str, Any]]:
    """The base model and the description of the data that lie beside trained weights. What they say is bounded.

    Raises:
        InputError: there are none, or they do not describe a task.
    """
    kept = read_json(folder, META_FILE)
    try:
        spec, meta = ModelSpec.model_validate(kept["model"]), dict(kept["data"])
        get_task(meta["task"])
        _check_meta(meta)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(one_line(f"{folder / META_FILE} does not describe a task ({error})")) from None
    return spec, meta


def _check_meta(meta: dict[str, Any]) -> None:
    for key in ("format", "text", "labels", "max_length"):
        meta[key]
    for key in ("format", "text", "text_pair", "prompt", "completion", "messages", "label"):
        if not isinstance(meta.setdefault(key, None), (str, type(None))):
            raise TypeError(f"{key} must be a string or null")
    labels, length = meta["labels"], meta["max_length"]
    named = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    if not named and (labels is not None or meta["task"] == "classification"):
        raise TypeError("labels must be a list of strings")
    if labels is not None and not 1 < len(labels) <= MAX_LABELS:
        raise ValueError(f"labels has {len(labels):,} entries; allowed: 2 to {MAX_LABELS:,}")
    if isinstance(length, bool) or not isinstance(length, int) or not 0 < length <= MAX_TOKENS:
        raise ValueError(f"max_length={length!r} must be an int from 1 to {MAX_TOKENS:,}")
