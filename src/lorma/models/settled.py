"""What training settles on a base model and its tokenizer, once, for every way back to what it has trained.

The padding token and the limit of tokens are settled where the tokenizer is loaded
(:func:`lorma.models.load.load_tokenizer`). What others need to know is written beside the trained weights, under
``settled`` in ``lorma_task.json``.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorma.adapters.untrusted import read_json
from lorma.errors import InputError, one_line
from lorma.files import META_FILE
from lorma.models.load import load_config, locate
from lorma.schema import ModelSpec
from lorma.tasks import CausalLM, Task
from lorma.tasks.stopping import stop_token_ids

MAX_STOPS = 64
MAX_TOKEN_TEXT = 256
"""Bounds on what a folder may say about tokens."""
DECIDING = ("do_sample", "num_beams", "use_cache", "return_dict_in_generate", "eos_token_id", "pad_token_id")
"""Generation settings that others must agree with, and so are kept before them."""


@dataclass(frozen=True)
class Settled:
    """What training settled on the base model and its tokenizer, as it is written beside trained weights.

    Attributes:
        pad_token: the padding token; it counts where the tokenizer has none of its own.
        stop_tokens: what ends an answer of a language model.
        load: arguments that ``from_pretrained`` of plain transformers needs besides, by name: ``pad_token_id`` where
            the base model's configuration has none, ``ignore_mismatched_sizes`` where its head is replaced.
    """

    pad_token: str | None = None
    stop_tokens: tuple[str, ...] = ()
    load: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """What stands in the file, under ``settled``."""
        return {"pad_token": self.pad_token, "stop_tokens": list(self.stop_tokens), "load": dict(self.load)}


def read_settled(folder: Path) -> Settled:
    """What lies beside trained weights about tokens; nothing where an older version wrote the file.

    Raises:
        InputError: it is not what this library writes.
    """
    kept = read_json(folder, META_FILE).get("settled", {})
    try:
        pad, stops, load = kept.get("pad_token"), list(kept.get("stop_tokens", ())), dict(kept.get("load", {}))
        texts = [*stops, *([] if pad is None else [pad])]
        if len(stops) > MAX_STOPS or not all(isinstance(t, str) and 0 < len(t) <= MAX_TOKEN_TEXT for t in texts):
            raise ValueError("stop_tokens and pad_token must be tokens")
        kinds: dict[str, type] = {"pad_token_id": int, "ignore_mismatched_sizes": bool}
        for key, value in load.items():
            if type(value) is not kinds.get(key):
                raise ValueError(f"load: {key}={value!r} is not allowed")
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(one_line(f"{folder / META_FILE}: settled does not describe tokens ({error})")) from None
    return Settled(pad, tuple(stops), load)


def settle(
    spec: ModelSpec, task: Task, base: Any, tokenizer: Any, model_kwargs: Mapping[str, Any], *, new_head: bool
) -> Settled:
    """Settle what the base model is trained and saved with, in place, and describe it.

    Args:
        model_kwargs: what the base model was loaded with.
        new_head: whether its head was replaced.
    """
    stops: list[str] = []
    if isinstance(task, CausalLM) and getattr(base, "generation_config", None) is not None:
        ids = stop_token_ids(tokenizer, base.generation_config)
        base.generation_config.eos_token_id = ids[0] if len(ids) == 1 else ids or None
        stops = [token for token in tokenizer.convert_ids_to_tokens(ids) if token]
    load: dict[str, Any] = {"ignore_mismatched_sizes": True} if new_head else {}
    pad = model_kwargs.get("pad_token_id")
    if pad is not None and (locate(spec).gguf_file or _pad_of(load_config(spec)) != pad):
        load["pad_token_id"] = pad
    return Settled(tokenizer.pad_token, tuple(stops), load)


def _pad_of(config: Any) -> int | None:
    found: int | None = getattr(config.get_text_config(), "pad_token_id", None)
    return found


def try_saving(spec: ModelSpec, model: Any, tokenizer: Any, say: Callable[[str], object]) -> None:
    """Write what a run writes at its end into a folder that is thrown away, all but the weights of a whole model.

    Generation settings of a model that is trained whole, and which transformers refuses to save, are taken back to
    their defaults; an adapter has none.

    Args:
        say: called with a line about such settings.

    Raises:
        InputError: something cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            if hasattr(model, "peft_config"):
                model.save_pretrained(folder, save_embedding_layers=False)
                return
            model.config.save_pretrained(folder)
            if model.can_generate():
                dropped = mend_generation(model)
                if dropped:
                    say(
                        f"  generation settings of {spec.name} that have no effect, and cannot be saved, are left out: "
                        f"{', '.join(dropped)}"
                    )
                model.generation_config.save_pretrained(folder)
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError, KeyError, NotImplementedError) as error:
        raise InputError(
            f"model.name={spec.name!r}: what this run is to write cannot be written: {one_line(error)}"
        ) from error


def mend_generation(model: Any) -> list[str]:
    """Leave out of a model's generation settings what contradicts the others, so that they can be saved.

    Returns: what was left out, as ``name=value``.
    """
    from transformers import GenerationConfig

    given = model.generation_config
    if _is_savable(given):
        return []
    kept, dropped = GenerationConfig(), []
    defaults = copy.copy(vars(kept))
    changed = [name for name, value in vars(given).items() if name not in defaults or value != defaults[name]]
    for name in sorted(changed, key=lambda name: name not in DECIDING):
        setattr(kept, name, getattr(given, name))
        if not _is_savable(kept):
            dropped.append(f"{name}={getattr(given, name)!r}")
            if name in defaults:
                setattr(kept, name, defaults[name])
            else:
                delattr(kept, name)
    model.generation_config = kept
    return sorted(dropped)


def _is_savable(config: Any) -> bool:
    try:
        config.validate(strict=True)
        config.to_json_string()
    except (ValueError, TypeError, AttributeError):
        return False
    return True
