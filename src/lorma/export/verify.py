"""Whether a written model answers as the adapted one does. One of them is in memory at a time."""

from __future__ import annotations

import io
import warnings
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer

from lorma.deltas.adapted import NAME, Adapted, adapted_layers, own_name
from lorma.errors import one_line
from lorma.models.structure import Base
from lorma.models.weights import LoadedWeights, load_whole

PROMPT = "Multiplying a weight by a matrix near the identity changes little, and what it changes can be measured."
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4}
"""Relative difference that rounding may make; in 16 bits ``COARSE``."""
COARSE = 5e-2

IMAGE_SIZE = 224
"""Pixels where a configuration names no size."""
MAX_TOKENS = 64
"""Of the prompt; encoders of text beside images take little more."""
NOT_RUN = (AttributeError, AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What a model raises that wants other inputs than it is given."""

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Expected:
    """What the adapted model answers, and to what.

    Attributes:
        outputs: the answer; None if there is none.
        inputs: the prompt.
        reason: why there is no answer, if so.
    """

    outputs: Tensor | None
    inputs: Inputs
    reason: str = ""


def load_adapted_outputs(adapted: Adapted, adapter: Path) -> Expected:
    """What the base model with the adapter on it answers to a prompt."""
    structure = adapted.peft_model.get_base_model()
    tried = _inputs(structure, adapted.base)
    if not tried:
        return Expected(None, {}, "no known input")
    whole = adapted.weights
    model = whole.model if isinstance(whole, LoadedWeights) else load_whole(adapted.base, type(structure))[0]
    copied = {name: whole.read(name).clone() for name in adapted.copies if name in whole}
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        peft_model = PeftModel.from_pretrained(model, str(adapter))
        for path, layer in adapted_layers(peft_model, NAME):
            if own_name(path, layer) in copied:  # which the adapter's file may hold in less precision
                getattr(layer.get_base_layer(), layer.weight_name).data.copy_(copied[own_name(path, layer)])
        reason = ""
        for inputs in tried:
            try:
                return Expected(_outputs(peft_model, inputs), inputs)
            except NOT_RUN as error:
                reason = f"the adapted model cannot be run on {' and '.join(inputs)} ({one_line(error, 120)})"
    return Expected(None, {}, reason)


def check_same(reference: Expected, model_class: Any, folder: Path) -> float | None:
    """Relative difference of what the model in ``folder`` answers; None if there is nothing to compare.

    Raises:
        ValueError: it is more than rounding explains, or the adapted model's answer is not finite.
    """
    expected = reference.outputs
    if expected is None:
        return None
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        model = model_class.from_pretrained(folder, dtype="auto", use_safetensors=True)
    found = _outputs(model, reference.inputs)
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


def _inputs(model: Any, base: Base) -> list[Inputs]:
    """Prompts for a model, to be tried in turn: text (numbers in the range of the vocabulary), text and an image."""
    kind = getattr(model, "main_input_name", None)
    config = model.config
    if kind == "input_ids":
        ids = _token_ids(base) % max(config.get_text_config().vocab_size, 1)
        inputs = {"input_ids": ids[None]}
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = ids[None, :4]
        vision = getattr(config, "vision_config", None)
        return [inputs] if vision is None else [inputs, inputs | _image(vision)]
    return [_image(config)] if kind == "pixel_values" else []


def _image(config: Any) -> Inputs:
    size = getattr(config, "image_size", None)
    pair = size if isinstance(size, (list, tuple)) and len(size) == 2 else 2 * [size or IMAGE_SIZE]
    if not all(isinstance(side, int) for side in pair):
        pair = [IMAGE_SIZE, IMAGE_SIZE]
    shape = (1, getattr(config, "num_channels", 3), *pair)
    return {"pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(0))}


def _token_ids(base: Base) -> Tensor:
    try:
        with redirect_stderr(io.StringIO()):
            tokenizer: Any = AutoTokenizer.from_pretrained(base.path, **base.hub_kwargs())
        ids = tokenizer(PROMPT)["input_ids"]
    except (OSError, ValueError, ImportError, KeyError):
        ids = []
    return torch.tensor(ids[:MAX_TOKENS] if len(ids) > 3 else range(3, 19))


@torch.no_grad()
def _outputs(model: Any, inputs: Inputs) -> Tensor:
    model.eval()
    given = {name: t.to(model.dtype) if t.is_floating_point() else t for name, t in inputs.items()}
    answer = model(**given)
    found = getattr(answer, "logits", None)
    return (answer[0] if found is None else found).float().clone()
