"""The base model of an adapter without loading it: its structure on the meta device.

``meta_model`` builds the model from its configuration alone; :mod:`lorma.models.weights` reads its weights:

    model = meta_model(base, "CAUSAL_LM")
    weights = open_weights(base, model)
    weights.read("model.layers.0.self_attn.q_proj.weight")
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers.utils import cached_file

from lorma.adapters.card import on_hub
from lorma.errors import InputError, one_line
from lorma.gguf_header import gguf_values

AUTO_MODELS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    ImportError,
    ArithmeticError,
    struct.error,
    StrictDataclassError,
)
"""What transformers raises for a configuration, or the head of a GGUF file, that is missing or nonsense."""


@dataclass(frozen=True)
class Base:
    """Which base model: a folder or hub name, and how it is loaded.

    Attributes:
        path: a local folder or a hub name.
        gguf_file: a GGUF file in it, read instead of safetensors.
        revision: of a hub repository.
        auto_model: name of the transformers auto class that gives the model its head; None asks the adapter's task
            type, then ``architectures`` of the model's configuration.
        model_kwargs: further arguments of ``from_pretrained`` that change the configuration, such as ``num_labels``.
        trust_remote_code: let the repository's own Python run.
        pad_token: the tokenizer's padding token, where it has none of its own.
        stop_tokens: tokens that end an answer besides those that the base model's generation settings name.
        load_kwargs: arguments of ``from_pretrained`` that others need to load the base model for the adapter.
    """

    path: str
    gguf_file: str | None = None
    revision: str | None = None
    auto_model: str | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False
    pad_token: str | None = None
    stop_tokens: Sequence[str] = ()
    load_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def hub_kwargs(self) -> dict[str, Any]:
        """Arguments that every ``from_pretrained`` of this base takes."""
        found: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.gguf_file:
            found["gguf_file"] = self.gguf_file
        if self.revision:
            found["revision"] = self.revision
        return found


def served_name(base: Base, recorded: str | None) -> str | None:
    """The name under which whoever has no lorma loads the base model: on the hub, or a folder.

    Args:
        recorded: the name in the adapter's configuration.

    Returns: None where only lorma knows the recorded name and it stands for a GGUF file.
    """
    if recorded is None or recorded == base.path or on_hub(base.path):
        return base.path
    if on_hub(recorded) and "/" in recorded:
        return recorded
    return recorded if Path(recorded).is_dir() else None if base.gguf_file else base.path


def read_config(base: Base) -> Any:
    """The configuration of the base model, changed by ``model_kwargs``.

    Raises:
        InputError: it cannot be read, says that the weights are quantised, or belongs to no model.
    """
    if base.gguf_file:
        _check_gguf(base, base.gguf_file)
    try:
        with redirect_stderr(io.StringIO()):
            config: Any = AutoConfig.from_pretrained(base.path, **base.hub_kwargs(), **base.model_kwargs)
    except UNREADABLE as error:
        raise InputError(f"base model {base.path!r} cannot be read: {one_line(error)}") from None
    if getattr(config, "quantization_config", None) is not None and not base.gguf_file:
        raise InputError(
            f"base model {base.path!r} is quantised; name the same model in full precision (--base), because the "
            "result is computed from the base weights"
        )
    return config


def _check_gguf(base: Base, name: str) -> None:
    """Refuse a GGUF file that holds no model (``InputError``): of a LoRA, transformers would make one of 7B."""
    try:
        found = cached_file(base.path, name, revision=base.revision)
        kind = gguf_values(Path(str(found)), ["general.type"]).get("general.type")
    except OSError as error:
        raise InputError(f"base model {base.path!r} cannot be read: {one_line(error)}") from None
    if kind not in (None, "model"):
        raise InputError(
            f"base model {base.path!r}: {name} is a GGUF file of the type {one_line(repr(kind), 60)}, not a "
            "model; name the file of the model"
        )


def auto_class(base: Base, config: Any, task_type: str | None) -> Any:
    """The class that builds the model: an auto class, or the architecture that the configuration names."""
    name = base.auto_model or AUTO_MODELS.get(str(getattr(task_type, "value", task_type)))
    if name is None:
        named = next(iter(getattr(config, "architectures", None) or ["AutoModel"]))
        name = named if hasattr(transformers, named) else "AutoModel"
    return getattr(transformers, name)


def meta_model(base: Base, task_type: str | None = None) -> Any:
    """The base model with its parameters on the meta device: names, shapes and kinds of layers, no numbers.

    Args:
        task_type: of the adapter, where ``base`` does not name the auto class.

    Raises:
        InputError: the configuration cannot be read, or transformers has no such model.
    """
    config = read_config(base)
    cls = auto_class(base, config, task_type)
    try:
        with torch.device("meta"):
            if hasattr(cls, "from_config"):
                model = cls.from_config(config, trust_remote_code=base.trust_remote_code)
            else:
                model = cls(config)
    except (ValueError, TypeError, ImportError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise InputError(f"base model {base.path!r} cannot be built: {one_line(error)}") from None
    return model.eval()
