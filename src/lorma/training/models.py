"""Loading base models and tokenizers, whatever they come from, and putting a method on them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from typing import TYPE_CHECKING, Any

from lorma.errors import InputError
from lorma.training.methods import Method
from lorma.training.packaged import Source, find_model, install_hint
from lorma.tuners.targets import closest_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorma.training.recipe import AdapterSpec, ModelSpec


def locate(spec: ModelSpec) -> Source:
    """Where the model of a recipe is loaded from. Raises :class:`InputError` as :func:`find_model`."""
    return find_model(spec.name, spec.gguf_file, spec.revision)


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model.

    Raises:
        InputError: it cannot be loaded; one line that names the model.
    """
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = _load(AutoTokenizer, spec, {})
    return tokenizer


def load_model(spec: ModelSpec, auto_model: str, **kwargs: Any) -> PreTrainedModel:
    """A base model with the head that ``auto_model`` (the name of a transformers auto class) gives it.

    Raises:
        InputError: it cannot be loaded; one line that names the model.
    """
    import torch
    import transformers

    kwargs["dtype"] = getattr(torch, spec.dtype)
    if locate(spec).gguf_file is None:
        kwargs["use_safetensors"] = True
    elif hasattr(transformers, "GgufConfig"):
        kwargs["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model: PreTrainedModel = _load(getattr(transformers, auto_model), spec, kwargs)
    _forget_packing(model)
    return model


def _forget_packing(model: Any) -> None:
    """Make an unpacked GGUF model trainable: transformers goes on marking it as quantised, which Trainer refuses."""
    if getattr(model, "hf_quantizer", None) is None or not all(p.is_floating_point() for p in model.parameters()):
        return
    for owner, name in (
        (model, "hf_quantizer"),
        (model, "is_quantized"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if name in vars(owner):
            delattr(owner, name)


def _load(auto: Any, spec: ModelSpec, kwargs: dict[str, Any]) -> Any:
    source = locate(spec)
    if source.gguf_file:
        kwargs["gguf_file"] = source.gguf_file
    if source.revision:
        kwargs["revision"] = source.revision
    try:
        with _without_bars() if source.gguf_file else nullcontext():
            return auto.from_pretrained(source.path, trust_remote_code=spec.trust_remote_code, **kwargs)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"model.name={spec.name!r} cannot be loaded: {reason[:300]}{install_hint(spec.name)}"
        ) from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep reading a GGUF file from drawing bars that transformers' own switch for bars does not reach."""
    from transformers.utils import logging

    if logging.is_progress_bar_enabled():
        yield
        return
    with redirect_stderr(io.StringIO()):
        yield


def attach(model: PreTrainedModel, method: Method, adapter: AdapterSpec, task_type: str) -> Any:
    """The model with the method's adapter on it; the model itself for a method that trains it whole.

    Raises:
        InputError: target modules that match nothing or are of an unsupported kind, or a value that the method
            does not allow.
    """
    _check_names(model, "adapter.target_modules", adapter.target_modules)
    _check_names(model, "adapter.modules_to_save", adapter.modules_to_save)
    if method.build is None:
        return model
    from peft import get_peft_model

    try:
        return get_peft_model(model, method.build(adapter, task_type))
    except (ValueError, TypeError) as error:
        raise InputError(f"adapter: {error}") from error


def _check_names(model: PreTrainedModel, key: str, wanted: list[str] | str | None) -> None:
    if not isinstance(wanted, list):
        return
    names = [name for name, _ in model.named_modules()]
    for target in wanted:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise InputError(f"{key}: {target!r} matches no module; closest names: {closest_modules(model, [target])}")


def count_parameters(model: Any) -> dict[str, int]:
    """Trainable parameters in all, in the adapter, and in heads and other modules that are trained whole."""
    from peft.utils import AuxiliaryTrainingWrapper

    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = {
        id(p): p.numel()
        for module in model.modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for p in module.parameters()
        if p.requires_grad
    }
    head = sum(whole.values())
    return {"trainable_parameters": trainable, "adapter_parameters": trainable - head, "head_parameters": head}
