"""Whether a written model answers as the adapted one does. One of them is in memory at a time."""

from __future__ import annotations

import io
import warnings
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from lorma.export.adapted import Adapted
from lorma.export.base import Base
from lorma.export.weights import LoadedWeights, load_whole

PROMPT = "Multiplying a weight by a matrix near the identity changes little, and what it changes can be measured."
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4}
"""Relative difference that rounding may make; in 16 bits ``COARSE``."""
COARSE = 5e-2

Inputs = dict[str, Tensor]


def load_adapted_outputs(adapted: Adapted, base: Base, adapter: Path) -> tuple[Tensor | None, Inputs]:
    """What the base model with the adapter on it answers to a prompt, and the prompt; None if no input is known."""
    structure = adapted.peft_model.get_base_model()
    inputs = _inputs(structure, base)
    if inputs is None:
        return None, {}
    whole = adapted.weights
    model = whole.model if isinstance(whole, LoadedWeights) else load_whole(base, type(structure))[0]
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        peft_model = PeftModel.from_pretrained(model, str(adapter))
        return _outputs(peft_model, inputs), inputs


def check_same(expected: Tensor | None, inputs: Inputs, model_class: Any, folder: Path) -> float | None:
    """Relative difference of what the model in ``folder`` answers; None if there is nothing to compare.

    Raises:
        ValueError: it is more than rounding explains, or the adapted model's answer is not finite.
    """
    if expected is None:
        return None
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        model = model_class.from_pretrained(folder, dtype="auto", use_safetensors=True)
    found = _outputs(model, inputs)
    if not torch.isfinite(expected).all():
        raise ValueError("the adapted model answers with NaN or infinity; the adapter seems to be broken")
    found, expected = found.double(), expected.double()  # whose squares do not overflow
    difference = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
    allowed = TOLERANCE.get(model.dtype, COARSE)
    if not difference <= allowed:
        raise ValueError(
            f"the merged model answers otherwise than the adapted one (relative difference {difference:.2g}, allowed "
            f"{allowed:.2g}); nothing is written"
        )
    return difference


def _inputs(model: Any, base: Base) -> Inputs | None:
    """A prompt for a model: text for a tokenizer, else numbers in the range of the vocabulary, else an image."""
    kind = getattr(model, "main_input_name", None)
    config = model.config
    if kind == "input_ids":
        ids = _token_ids(base) % max(config.get_text_config().vocab_size, 1)
        inputs = {"input_ids": ids[None]}
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = ids[None, :4]
        return inputs
    if kind == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        size = (1, getattr(config, "num_channels", 3), config.image_size, config.image_size)
        return {"pixel_values": torch.randn(size, generator=torch.Generator().manual_seed(0))}
    return None


def _token_ids(base: Base) -> Tensor:
    from transformers import AutoTokenizer

    try:
        with redirect_stderr(io.StringIO()):
            tokenizer: Any = AutoTokenizer.from_pretrained(base.path, **base.hub_kwargs())
        ids = tokenizer(PROMPT)["input_ids"]
    except (OSError, ValueError, ImportError, KeyError):
        ids = []
    return torch.tensor(ids if len(ids) > 3 else range(3, 19))


@torch.no_grad()
def _outputs(model: Any, inputs: Inputs) -> Tensor:
    model.eval()
    given = {name: t.to(model.dtype) if t.is_floating_point() else t for name, t in inputs.items()}
    answer = model(**given)
    found = getattr(answer, "logits", None)
    return (answer[0] if found is None else found).float().clone()
