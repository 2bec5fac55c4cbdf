"""Loading base models and tokenizers, whatever they come from, and putting a method on them.

A base in 4 or 8 bits (``model.quantization``) is what transformers makes of it with bitsandbytes, with the settings of
QLoRA (arXiv 2305.14314) for 4 bits. PEFT's ``prepare_model_for_kbit_training`` is not called: freezing the base is done
by PEFT whenever it adds an adapter, gradient checkpointing and input gradients are the recipe's, and its remaining
step, casting what is not quantised to float32, is ``model.dtype``, float32 unless the recipe says otherwise.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorma.errors import InputError
from lorma.gguf_header import gguf_values
from lorma.methods import Method, Options
from lorma.methods.whole import head_parameters
from lorma.models.pickled import conversion_hint
from lorma.models.positions import position_limit
from lorma.models.source import Source, find_model, install_hint
from lorma.tasks.base import set_padding
from lorma.tuners.quantized import keep_layout, prepare_gguf_for_training
from lorma.tuners.targets import near_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorma.schema import AdapterSpec, ModelSpec


def locate(spec: ModelSpec) -> Source:
    """Where the model of a recipe is loaded from. Raises :class:`InputError` as :func:`find_model`."""
    return find_model(spec.name, spec.gguf_file, spec.revision)


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model, settled for it: training and every way back have theirs from here.

    It has a padding token (see :func:`lorma.tasks.base.set_padding`), and its ``model_max_length`` is no more than the
    model has positions for.

    Raises:
        InputError: it cannot be loaded, or cannot pad; one line that names the model.
    """
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = _load(AutoTokenizer, spec, {})
    set_padding(tokenizer)
    limit = _position_limit(spec, tokenizer.pad_token_id)
    if limit is not None and limit < tokenizer.model_max_length:
        tokenizer.model_max_length = limit
    return tokenizer


def _position_limit(spec: ModelSpec, pad_token_id: int | None) -> int | None:
    source = locate(spec)
    if not source.gguf_file:
        return position_limit(load_config(spec), pad_token_id, spec.trust_remote_code)
    from transformers.utils import cached_file

    try:
        file = cached_file(source.path, source.gguf_file, revision=source.revision)
        found: Any = gguf_values(Path(str(file)), ["*.context_length"]).get("*.context_length")
    except OSError:
        return None  # loading the model says what is wrong with it
    return found if isinstance(found, int) and found > 0 else None


def load_config(spec: ModelSpec) -> Any:
    """The configuration of a base model, without its weights.

    Raises:
        InputError: it cannot be loaded; one line that names the model.
    """
    from transformers import AutoConfig

    return _load(AutoConfig, spec, {})


def load_model(
    spec: ModelSpec, auto_model: str, *, say: Callable[[str], object] | None = None, **kwargs: Any
) -> PreTrainedModel:
    """A base model with the head that ``auto_model`` (the name of a transformers auto class) gives it.

    With ``num_labels``, a head in the checkpoint that is for another number of labels is replaced by a new one.

    Args:
        say: called with a line about such a new head.
        kwargs: further arguments of ``from_pretrained``.

    Raises:
        InputError: it cannot be loaded; one line that names the model.
    """
    import torch
    import transformers

    kwargs["dtype"] = getattr(torch, spec.dtype)
    packed = locate(spec).gguf_file is not None
    if not packed:
        kwargs["use_safetensors"] = True
        if spec.quantization:
            kwargs["quantization_config"] = _bitsandbytes_config(spec, auto_model)
    elif hasattr(transformers, "GgufConfig"):
        kwargs["quantization_config"] = transformers.GgufConfig(dequantize=True)
    auto = getattr(transformers, auto_model)
    model: PreTrainedModel
    if "num_labels" in kwargs:
        model, report = _load(auto, spec, kwargs | {"ignore_mismatched_sizes": True, "output_loading_info": True})
        _check_head(spec, model, report["mismatched_keys"], say)
    else:
        model = _load(auto, spec, kwargs)
    if packed:
        prepare_gguf_for_training(model)
        if spec.quantization:
            _quantize(model, _bitsandbytes_config(spec, auto_model))
    if getattr(model, "is_loaded_in_4bit", False):
        keep_layout(model)
        _check_layout(model)
    return model


def _check_head(
    spec: ModelSpec, model: Any, mismatched: Iterable[tuple[Any, ...]], say: Callable[[str], object] | None
) -> None:
    """Say that a head is new, or refuse weights of another size in the model below the head (``InputError``)."""
    sizes = {name: (tuple(stored), tuple(wanted)) for name, stored, wanted in mismatched}
    for name, (stored, wanted) in sizes.items():
        if name.startswith(f"{model.base_model_prefix}."):
            raise InputError(
                f"model.name={spec.name!r} cannot be loaded: {name} is {stored} in its weights and {wanted} by its "
                "configuration"
            )
    if sizes and say is not None:
        name, (stored, wanted) = max(sizes.items(), key=lambda item: len(item[1][0]))
        say(
            f"  the head of {spec.name} is for {stored[0]} labels ({name}), this task needs {wanted[0]}: a new head is "
            "made and trained"
        )


def _bitsandbytes_config(spec: ModelSpec, auto_model: str) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    # transformers keeps output embeddings and what is tied to them out of it, but not every head that is trained.
    heads = None if auto_model == "AutoModelForCausalLM" else ["classifier", "score"]
    if spec.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=heads)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, spec.dtype),
        llm_int8_skip_modules=heads,
    )


def _quantize(model: Any, config: Any) -> None:
    """What ``from_pretrained`` does with a quantisation configuration, for a model that is there already.

    It cannot do so with a GGUF file, which takes the place of that configuration. One layer at a time, so that no more
    than one is there twice.
    """
    from transformers.quantizers import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    quantizer.validate_environment()
    device_map = quantizer.update_device_map(None)
    before = dict(model.named_modules())
    quantizer.preprocess_model(model=model, device_map=device_map)
    convert = quantizer.get_quantize_ops().convert
    for name, module in model.named_modules():
        old = before.pop(name)
        if module is not old:
            module.weight = convert({f"{name}.weight": old.weight.data}, model=model)[f"{name}.weight"]
            module.bias = old.bias
            module.train(old.training)
            old.weight = None
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer
    model.to(device_map[""])


def _check_layout(model: Any) -> None:
    """Refuse layers whose 4-bit weights bitsandbytes reads back wrongly, tried out with random numbers.

    Its AVX-512 kernel (0.50.2) takes wrong block scales where the inputs are a multiple of 16 but not of 64.
    """
    import torch
    from bitsandbytes import functional
    from bitsandbytes.nn import Linear4bit

    for name, module in model.named_modules():
        if isinstance(module, Linear4bit) and module.weight.device.type == "cpu" and module.in_features % 64:
            trial = torch.randn(64, module.in_features, generator=torch.Generator().manual_seed(0))
            back = functional.dequantize_4bit(*functional.quantize_4bit(trial, blocksize=64, quant_type="nf4"))
            if (back - trial).norm() > 0.15 * trial.norm():
                raise InputError(
                    f"a base in 4 bits is not possible on this processor: {name} has {module.in_features} inputs, "
                    "no multiple of 64, and the installed bitsandbytes reads such weights back wrongly; choose "
                    "model.quantization=int8 or null, or a GPU"
                )


def _load(auto: Any, spec: ModelSpec, kwargs: dict[str, Any]) -> Any:
    if spec.quantization and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            f"model.quantization={spec.quantization!r} needs bitsandbytes, which is not installed: "
            'pip install "lorma[quant]"'
        )
    source = locate(spec)
    if source.gguf_file:
        kwargs["gguf_file"] = source.gguf_file
    if source.revision:
        kwargs["revision"] = source.revision
    try:
        with _without_bars() if source.gguf_file else nullcontext():
            return auto.from_pretrained(source.path, trust_remote_code=spec.trust_remote_code, **kwargs)
    except (OSError, ValueError, ImportError) as error:
        hint = conversion_hint(source.path, source.revision) if "use_safetensors" in kwargs else ""
        reason = hint or " ".join(str(error).split())[:300]
        raise InputError(f"model.name={spec.name!r} cannot be loaded: {reason}{install_hint(spec.name)}") from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep reading a GGUF file from drawing bars that transformers' own switch for bars does not reach."""
    from transformers.utils import logging

    if logging.is_progress_bar_enabled():
        yield
        return
    with redirect_stderr(io.StringIO()):
        yield


def attach(
    model: PreTrainedModel, method: Method, adapter: AdapterSpec, task_type: str, options: Options | None = None
) -> Any:
    """The model with the method's adapter on it; the model itself for a method that trains it whole.

    Raises:
        InputError: target modules that match nothing or are of an unsupported kind, or a value that the method
            does not allow.
    """
    _check_names(model, "adapter.target_modules", adapter.target_modules)
    _check_names(model, "adapter.modules_to_save", adapter.modules_to_save)
    _check_trainable(model, adapter.modules_to_save)
    if method.build is None:
        if method.prepare is not None:
            method.prepare(model, adapter, task_type)
        return model
    from peft import get_peft_model

    try:
        config: Any = method.configure(adapter, task_type, options or method.read_options({}))
        if config.target_modules is None and not method.own_targets:
            config.target_modules = _targets_of_lora(model)
        adapted = get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise InputError(f"adapter: {error}") from error
    if method.prepare is not None:
        method.prepare(adapted, adapter, task_type)
    return adapted


def _targets_of_lora(model: PreTrainedModel) -> set[str] | None:
    """PEFT's choice of modules for LoRA; PEFT chooses others, or none, for some of its methods."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as CHOICES

    names = CHOICES.get(model.config.model_type)
    return None if names is None else set(names)


def _check_names(model: PreTrainedModel, key: str, wanted: list[str] | str | None) -> None:
    if not isinstance(wanted, list):
        return
    names = [name for name, _ in model.named_modules()]
    for target in wanted:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise InputError(f"{key}: {target!r} matches no module; {near_modules(model, [target])}")


def _check_trainable(model: PreTrainedModel, wanted: list[str] | None) -> None:
    for name, module in model.named_modules():
        for target in wanted or []:
            if (name == target or name.endswith(f".{target}")) and not all(
                p.is_floating_point() for p in module.parameters()
            ):
                raise InputError(
                    f"adapter.modules_to_save: {target!r} is quantised (model.quantization) and cannot be trained whole"
                )


def count_parameters(model: Any, adapter: AdapterSpec, task_type: str) -> dict[str, int]:
    """Trainable parameters in all, in the adapter, and in heads and other modules that are trained whole.

    The last are counted apart for every method, as papers count them, also where the model itself is trained.
    """
    from peft.utils import AuxiliaryTrainingWrapper

    if hasattr(model, "peft_config"):
        wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        heads = [parameter for module in wrappers for parameter in module.parameters()]
    else:
        heads = list(head_parameters(model, adapter, task_type).values())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    head = sum({id(p): p.numel() for p in heads if p.requires_grad}.values())
    return {"trainable_parameters": trainable, "adapter_parameters": trainable - head, "head_parameters": head}
