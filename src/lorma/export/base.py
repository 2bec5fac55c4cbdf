"""The base model of an adapter without loading it: its structure on the meta device.

``meta_model`` builds the model from its configuration alone; :mod:`lorma.export.weights` reads its weights:

    model = meta_model(base, "CAUSAL_LM")
    weights = open_weights(base, model)
    weights.read("model.layers.0.self_attn.q_proj.weight")
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from typing import Any

import torch

from lorma.errors import InputError, one_line

AUTO_MODELS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


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
    """

    path: str
    gguf_file: str | None = None
    revision: str | None = None
    auto_model: str | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False

    def hub_kwargs(self) -> dict[str, Any]:
        """Arguments that every ``from_pretrained`` of this base takes."""
        found: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.gguf_file:
            found["gguf_file"] = self.gguf_file
        if self.revision:
            found["revision"] = self.revision
        return found


def read_config(base: Base) -> Any:
    """The configuration of the base model, changed by ``model_kwargs``.

    Raises:
        InputError: it cannot be read, or says that the weights are quantised.
    """
    from transformers import AutoConfig

    try:
        with redirect_stderr(io.StringIO()):
            config: Any = AutoConfig.from_pretrained(base.path, **base.hub_kwargs(), **base.model_kwargs)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"base model {base.path!r} cannot be read: {one_line(error)}") from None
    if getattr(config, "quantization_config", None) is not None and not base.gguf_file:
        raise InputError(
            f"base model {base.path!r} is quantised; name the same model in full precision (--base), because the "
            "result is computed from the base weights"
        )
    return config


def auto_class(base: Base, config: Any, task_type: str | None) -> Any:
    """The class that builds the model: an auto class, or the architecture that the configuration names."""
    import transformers

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
    except (ValueError, TypeError, ImportError, AttributeError) as error:
        raise InputError(f"base model {base.path!r} cannot be built: {one_line(error)}") from None
    return model.eval()
