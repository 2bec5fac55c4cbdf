"""Base layers whose weight is stored in a few bits: which they are, and how a merge writes into one.

Training and inference never look at such a weight: LoRMA calls the base layer and multiplies what goes in or comes
out. Only merging (and DoRMA's norms) need the numbers, and get them through PEFT's quantisation backends.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from peft.utils.quantization_utils import (
    ForwardOnlyQuantizationBackend,
    QuantizationBackend,
    TorchaoBackend,
    resolve_quantization_backend,
)
from torch import Tensor, nn

from lorma.errors import InputError
from lorma.functional.multiplier import widen

logger = logging.getLogger(__name__)


def quantization_backend(base_layer: nn.Module, **kwargs: Any) -> QuantizationBackend | None:
    """PEFT's backend for a quantised layer, None for an ordinary one.

    Args:
        base_layer: the layer to look at.
        **kwargs: what PEFT's ``get_quantization_kwargs`` finds out about the model.
    """
    weight = getattr(base_layer, "weight", None)
    if type(weight).__module__.startswith("torchao.") and not kwargs.get("get_apply_tensor_subclass"):
        return UnknownTorchaoBackend()
    return resolve_quantization_backend(base_layer, **kwargs)


def keep_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for a faster CPU kernel at the first pass in evaluation mode.

    The repacked form (bitsandbytes 0.50.2, processors with AVX-512 BF16) rounds block scales to bfloat16, lets no
    gradient through, also later in training mode, and does not take layers whose sizes are no multiples of 32 and 64.
    Training and evaluation would not even compute the same function.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def prepare_gguf_for_training(model: Any) -> Any:
    """Make a model that transformers has unpacked from a GGUF file one that its Trainer and TRL's train.

    transformers (5.23) goes on marking such a model as quantised when every weight is an ordinary tensor, and its
    Trainer then refuses it; so does TRL. This takes the mark off. Weights are not changed::

        base = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file="model.gguf", quantization_config=transformers.GgufConfig(dequantize=True)
        )
        trainer = SFTTrainer(model=lorma.prepare_gguf_for_training(base), peft_config=LormaConfig(...), ...)

    Args:
        model: the model, or a PeftModel of it. One that carries no such mark is left alone.

    Returns: the same model.

    Raises:
        InputError: its weights are still packed, or it was quantised in another way than by a GGUF file.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    quantizer = getattr(inner, "hf_quantizer", None)
    if quantizer is None:
        return model
    method = getattr(quantizer.quantization_config, "quant_method", "")
    method = str(getattr(method, "value", method))
    if method != "gguf":
        raise InputError(f"the model is quantised by {method!r}; only a model from a GGUF file is prepared in this way")
    packed = next((name for name, parameter in inner.named_parameters() if not parameter.is_floating_point()), None)
    if packed is not None:
        raise InputError(
            f"{packed} is still packed as in the GGUF file; load the model with "
            "quantization_config=transformers.GgufConfig(dequantize=True)"
        )
    for owner, name in (
        (inner, "hf_quantizer"),
        (inner, "is_quantized"),
        (inner, "quantization_method"),
        (inner.config, "quantization_config"),
    ):
        if name in vars(owner):
            delattr(owner, name)
    return model


class UnknownTorchaoBackend(TorchaoBackend):
    """A torchao weight whose configuration is not known, because the model was not loaded with a ``TorchAoConfig``.

    It can be read, and so merged into a full-precision layer, but not rounded into the same format again.
    """

    def __init__(self) -> None:
        super().__init__(get_apply_tensor_subclass=None)

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        raise ValueError(
            "quantized='requantize' needs to know how torchao quantised the model: load it through transformers with "
            "a TorchAoConfig, or choose quantized='dequantize'"
        )


def dequantized(layer: Any) -> Tensor:
    """The base weight as a floating-point tensor (d × k).

    Raises:
        ValueError: if the backend cannot read its own format back.
    """
    backend = layer.quantization_backend
    if backend is None or isinstance(backend, ForwardOnlyQuantizationBackend):
        name = backend.backend_name if backend is not None else "unknown"
        raise ValueError(
            f"{layer.layer_name} has a {name} base, whose weight cannot be read back; merging is not available"
        )
    base = layer.get_base_layer()
    if getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False):
        raise ValueError(
            f"bitsandbytes has repacked the 4-bit weight of {layer.layer_name} for its CPU kernel and cannot read it "
            "back; add the adapter before the model is first evaluated, or load the model again"
        )
    read = backend.get_base_weight
    if not isinstance(backend, TorchaoBackend):  # bitsandbytes' parameters cannot be traced by torch.compile
        read = torch.compiler.disable(read)
    return read(base).detach()


def write_quantized(layer: Any, merged: Tensor, how: str) -> float:
    """Put a merged weight into a layer with a quantised base.

    Args:
        layer: the tuner layer.
        merged: the exact result, d × k.
        how: ``"requantize"`` rounds it into the base's own format; ``"dequantize"`` puts an ``nn.Linear`` in full
            precision in the base layer's place.

    Returns:
        The relative error (Frobenius norm) of what the base layer now holds.
    """
    backend = layer.quantization_backend
    assert backend is not None
    read = dequantized(layer)
    if how == "requantize":
        backend.set_base_weight(layer, merged.to(read.dtype))
        written = dequantized(layer)
    else:
        base: Any = layer.get_base_layer()
        d, k = merged.shape
        linear = nn.Linear(k, d, bias=base.bias is not None, device="meta")
        dtype = layer.model_dtype or (read if base.bias is None else base.bias).dtype
        written = merged.to(device=base.weight.device, dtype=dtype)
        linear.weight = nn.Parameter(written, requires_grad=False)
        linear.bias = base.bias
        layer.base_layer = linear.train(base.training)
        layer.quantization_backend = None
    error = torch.linalg.vector_norm(widen(written).to(merged.device) - merged) / torch.linalg.vector_norm(merged)
    return error.item()


class QuantizedSnapshot:
    """A quantised base layer as it was before a merge, for putting back bit for bit.

    Backends keep parts of a weight beside it (scales in the parameter's own attributes, in ``state`` or in
    ``quant_state``) and may replace the parameter, its attributes or the whole layer; all of that is noted.
    """

    def __init__(self, layer: Any) -> None:
        self.backend = layer.quantization_backend
        self.module: Any = layer.get_base_layer()
        self.parameter = self.module.weight
        self.attributes = dict(vars(self.parameter))
        self.state = copy.copy(getattr(self.module, "state", None))
        self.quant_state = getattr(self.module, "quant_state", None)

    def read(self, layer: Any) -> Tensor:
        """The original weight in floating point; ``layer`` is left as it is."""
        now = QuantizedSnapshot(layer)
        self.restore(layer)
        try:
            return dequantized(layer)
        finally:
            now.restore(layer)

    def restore(self, layer: Any) -> None:
        """Put everything back into ``layer``."""
        layer.base_layer = self.module
        layer.quantization_backend = self.backend
        self.module.train(getattr(layer, "training", False))
        self.module.weight = self.parameter
        vars(self.parameter).update(self.attributes)
        if self.state is not None:
            self.module.state = self.state
        if self.quant_state is not None:
            self.module.quant_state = self.quant_state


def log_requantization(errors: dict[str, float | None]) -> None:
    """Log the largest relative error that rounding into quantised bases added, if any layer has one."""
    known = {layer: error for layer, error in errors.items() if error}
    if known:
        worst = max(known, key=lambda layer: known[layer])
        logger.warning(
            "merging: rounding to the storage format changed the merged weights by up to %.2g (relative; %s)",
            known[worst],
            worst,
        )
