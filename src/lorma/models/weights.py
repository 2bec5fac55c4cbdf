"""The weights of a base model, each read when it is asked for, by its name in the model.

A checkpoint in safetensors (one file or shards with an index; a folder or the hub's cache) is read tensor by tensor. A
GGUF file is unpacked by transformers and held whole. Nothing else is read: no pickles.
"""

from __future__ import annotations

import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.utils import cached_file

from lorma.adapters.untrusted import DTYPES, TensorInfo
from lorma.errors import InputError, one_line
from lorma.models.pickled import conversion_hint
from lorma.models.structure import Base

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class BaseWeights(ABC):
    """Parameters (and saved buffers) of a base model, each read when it is asked for.

    Names are those of the model that ``open_weights`` was given, without any wrapper of PEFT.
    """

    @abstractmethod
    def __contains__(self, name: str) -> bool:
        """Whether the checkpoint has this parameter; a head that is trained anew it has not."""

    @abstractmethod
    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of one parameter, without reading it."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One parameter in the precision in which it is stored.

        Raises:
            InputError: the checkpoint has no such parameter.
        """

    def _missing(self, name: str, path: str) -> InputError:
        return InputError(f"the base model {path!r} has no weight for {name}")


class SafetensorsWeights(BaseWeights):
    """A checkpoint in safetensors, one file or shards.

    Attributes:
        shards: which file each tensor of the checkpoint is in, by the checkpoint's own names.
        checkpoint_names: what the checkpoint calls each parameter of the model that it has.
    """

    def __init__(self, base: Base, model: nn.Module) -> None:
        self.base = base
        self.shards = _find_shards(base)
        self.checkpoint_names = match_names(model, self.shards)

    def __contains__(self, name: str) -> bool:
        return name in self.checkpoint_names

    def info(self, name: str) -> TensorInfo:
        with self.open(name) as file:
            part = file.get_slice(self.checkpoint_names[name])
            if part.get_dtype() not in DTYPES:
                raise InputError(f"the base model holds {name} as {part.get_dtype()}; allowed: {', '.join(DTYPES)}")
            return TensorInfo(tuple(part.get_shape()), DTYPES[part.get_dtype()])

    def read(self, name: str) -> Tensor:
        with self.open(name) as file:
            tensor: Tensor = file.get_tensor(self.checkpoint_names[name])
            return tensor

    def file_of(self, shard: str) -> Path:
        """Where a shard lies; one on the hub is fetched into the cache."""
        return base_file(self.base, shard)

    def open(self, name: str) -> Any:
        """The open safetensors file that holds one parameter of the model (a context manager)."""
        if name not in self.checkpoint_names:
            raise self._missing(name, self.base.path)
        path = self.file_of(self.shards[self.checkpoint_names[name]])
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is truncated or not a safetensors file ({one_line(error)})") from None


class LoadedWeights(BaseWeights):
    """Parameters of a model that is loaded whole, for checkpoints that cannot be read in parts."""

    def __init__(self, base: Base, model_class: Any) -> None:
        self.base = base
        self.model, missing = load_whole(base, model_class)
        self._state = {name: tensor for name, tensor in self.model.state_dict().items() if name not in missing}

    def __contains__(self, name: str) -> bool:
        return name in self._state

    def info(self, name: str) -> TensorInfo:
        tensor = self.read(name)
        return TensorInfo(tuple(tensor.shape), tensor.dtype)

    def read(self, name: str) -> Tensor:
        if name not in self._state:
            raise self._missing(name, self.base.path)
        tensor: Tensor = self._state[name]
        return tensor


def open_weights(base: Base, model: Any) -> BaseWeights:
    """The weights of ``base`` under the names that ``model`` (see :func:`meta_model`) gives them.

    Raises:
        InputError: no safetensors and no GGUF file, an index that names files elsewhere, or names that do not belong
            to this model.
    """
    return LoadedWeights(base, type(model)) if base.gguf_file else SafetensorsWeights(base, model)


def load_whole(base: Base, model_class: Any) -> tuple[Any, set[str]]:
    """The base model with its weights, and the names of those that the checkpoint lacks.

    What is unpacked from a GGUF file is in float32, other weights are in the precision they are stored in.
    """
    kwargs: dict[str, Any] = {**base.hub_kwargs(), **base.model_kwargs}
    if base.gguf_file:
        kwargs["dtype"] = torch.float32
        if hasattr(transformers, "GgufConfig"):
            kwargs["quantization_config"] = transformers.GgufConfig(dequantize=True)
    else:
        kwargs |= {"dtype": "auto", "use_safetensors": True}
    # Of another number of labels than the checkpoint's, whose head then counts as missing.
    kwargs["ignore_mismatched_sizes"] = "num_labels" in base.model_kwargs
    try:
        with redirect_stderr(io.StringIO()):
            model, report = model_class.from_pretrained(base.path, output_loading_info=True, **kwargs)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"base model {base.path!r} cannot be loaded: {one_line(error)}") from None
    return model.eval(), {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}


def match_names(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """What a checkpoint calls each parameter of a model: the same, or with the base model's prefix more or less.

    A BertModel checkpoint under a BertForSequenceClassification lacks ``bert.``. A tied parameter is found under the
    name of the one that it shares.

    Raises:
        InputError: no parameter is in the checkpoint at all.
    """
    available = set(stored)
    prefix = f"{getattr(model, 'base_model_prefix', '') or ''}."
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}

    def find(name: str) -> str | None:
        return next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in available), None)

    names: dict[str, str] = {}
    for name in model.state_dict():
        found = find(name) or (find(tied[name]) if name in tied else None)
        if found is not None:
            names[name] = found
    if not names:
        raise InputError(
            f"the checkpoint does not belong to a {type(model).__name__}: it has no weight of it, but "
            f"{', '.join(sorted(available)[:2]) or 'nothing'}"
        )
    return names


def _find_shards(base: Base) -> dict[str, str]:
    """The file of each tensor. Where there are both kinds of checkpoint, transformers reads the single file."""
    path = base_file(base, SINGLE_FILE, optional=True)
    if path is not None:
        try:
            with safe_open(path, framework="pt") as file:
                return dict.fromkeys(file.keys(), SINGLE_FILE)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is truncated or not a safetensors file ({one_line(error)})") from None
    index = base_file(base, INDEX_FILE, optional=True)
    if index is None:
        reason = f"it has no {SINGLE_FILE} and no {INDEX_FILE}; only safetensors are read"
        hint = conversion_hint(base.path, base.revision)
        raise InputError(f"base model {base.path!r} cannot be read: {hint or reason}")
    try:
        shards = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{index} cannot be read: {one_line(error)}") from None
    for shard in set(shards.values()):
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise InputError(f"{index} names {shard!r}, which is no safetensors file beside it")
    return shards


def base_file(base: Base, name: str, optional: bool = False) -> Any:
    """A file of the base model's folder or repository; None if it is optional and not there."""
    try:
        found = cached_file(base.path, name, revision=base.revision, _raise_exceptions_for_missing_entries=not optional)
    except OSError as error:
        raise InputError(f"base model {base.path!r} cannot be read: {one_line(error)}") from None
    return None if found is None else Path(found)
