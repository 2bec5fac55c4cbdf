"""An adapter as a LoRA file for llama.cpp.

To the output of a weight ``NAME`` llama.cpp adds ``alpha / r · NAME.lora_b·NAME.lora_a·x`` (``build_lora_mm`` in
``llama-graph.cpp``), with r read off each pair of tensors. There is one alpha for all layers, so different ranks are
evened out in B here. Its converters change some weights of the base model, and the update changes with them:

* Llama and Mistral: rows of q_proj and k_proj are reordered within each head, from halves (transformers' rotary
  embedding) to pairs (llama.cpp's). B's rows are reordered alike. The others keep transformers' order.
* GPT-2: ``Conv1D`` is transposed; the form here is out × in already.
* Fused projections (GPT-2's ``c_attn``, Phi-3's ``qkv_proj`` and ``gate_up_proj``) stay fused.
* Token embeddings: A is looked up by token, so it lies as V × r.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorma.deltas.adapted import Adapted, open_adapter
from lorma.deltas.forms import CONVOLUTIONS, LoraForm
from lorma.deltas.truncation import Truncation
from lorma.errors import InputError
from lorma.export.lora import DTYPES, LayerReport, adapter_folder, base_of, check_dtype, forms_of
from lorma.files import check_output, write_file
from lorma.models.structure import Base

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi": "phi2",
    "phi3": "phi3",
    "gpt2": "gpt2",
}
"""llama.cpp's architecture for transformers' ``model_type``."""
PAIRED_ROTARY = ("llama",)
"""Architectures whose q and k rows llama.cpp's converter reorders."""


def export_gguf(
    adapter: str | Path,
    output: str | Path,
    *,
    base: Base | None = None,
    dtype: str = "float32",
    uniform_rank: bool = False,
    truncation: Truncation | None = None,
    overwrite: bool = False,
) -> list[LayerReport]:
    """Write an adapter as a LoRA file for llama.cpp (``llama-cli -m BASE.gguf --lora FILE.gguf``).

    Args: as in :func:`lorma.export.export_lora`; ``output`` is a file whose name ends in ``.gguf``.

    Returns: a report for each adapted layer.

    Raises:
        InputError: as ``export_lora`` does; the package gguf is missing; an architecture that is not known here; heads
            or biases that were trained, which such a file cannot hold.
    """
    output = Path(output)
    check_dtype(dtype)
    if output.suffix != ".gguf":
        raise InputError(f"output={str(output)!r} must end in .gguf")
    _import_gguf()
    folder = adapter_folder(adapter)
    base = base or base_of(folder)
    packed = [Path(base.path, base.gguf_file)] if base.gguf_file else []
    check_output(output, overwrite, folder, base.path, *packed, kind=None)
    adapted = open_adapter(folder, base)
    architecture = _architecture(adapted)
    _check_others(adapted)
    forms = forms_of(adapted, truncation, DTYPES["float32"])
    largest = max(form.rank for form in forms)
    padded = [form.padded(largest) for form in forms] if uniform_rank else forms
    tensors: dict[str, Tensor] = {}
    names = _tensor_names(adapted, architecture, [form.path for form in forms])
    for form, name in zip(padded, names, strict=True):
        down, up = _in_their_layout(form, adapted.peft_model.config, architecture)
        tensors[f"{name}.lora_a"] = down
        tensors[f"{name}.lora_b"] = up * (form.rank / largest)
    for name, tensor in tensors.items():
        if not tensor.to(DTYPES[dtype]).isfinite().all():
            raise InputError(f"{name} cannot be exported in {dtype}: it would not be finite")
    write_file(output, lambda temporary: _write(temporary, architecture, largest, tensors, dtype))
    return [LayerReport(form.path, form.rank, form.error, form.change) for form in forms]


def _import_gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise InputError('--format gguf needs the package gguf: pip install "lorma[gguf]"') from None
    return gguf


def _architecture(adapted: Adapted) -> str:
    """llama.cpp's name of the base model's architecture."""
    kind = adapted.peft_model.config.model_type
    if kind not in ARCHITECTURES:
        raise InputError(f"a {kind} model cannot be exported to gguf; supported: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[kind]


def _check_others(adapted: Adapted) -> None:
    if adapted.tokens:
        first = sorted(adapted.tokens)[0]
        raise InputError(
            f"the adapter has trained tokens (trainable_token_indices, rows of {first}), which llama.cpp's adapter "
            "files cannot hold: an update of low rank is all that they add to embeddings; lorma merge writes a whole "
            "model"
        )
    if adapted.others:
        first = sorted(adapted.others)[0]
        raise InputError(
            f"the adapter holds trained modules or biases ({first}), which llama.cpp's adapter files cannot; "
            "lorma merge writes a whole model"
        )


def _tensor_names(adapted: Adapted, architecture: str, paths: list[str]) -> list[str]:
    """llama.cpp's names of the adapted weights.

    Raises:
        InputError: a layer that has none, or whose tensor in llama.cpp is shared with another use.
    """
    gguf = _import_gguf()
    config = adapted.peft_model.config
    kinds = {name: member for member, name in gguf.MODEL_ARCH_NAMES.items()}
    known = gguf.get_tensor_name_map(kinds[architecture], config.num_hidden_layers)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    names = []
    for path in paths:
        name = known.get_name(f"{path}.weight", try_suffixes=(".weight",))
        if name is None:
            raise InputError(f"{path} cannot be exported to gguf: llama.cpp's {architecture} has no such weight")
        if tied and name in ("token_embd.weight", "output.weight"):
            raise InputError(
                f"{path} cannot be exported to gguf: the model ties its embeddings, and llama.cpp would adapt both"
            )
        names.append(name)
    return names


def _in_their_layout(form: LoraForm, config: Any, architecture: str) -> tuple[Tensor, Tensor]:
    if isinstance(form.module, CONVOLUTIONS):
        raise InputError(f"{form.path} cannot be exported to gguf: it is a convolution")
    if isinstance(form.module, nn.Embedding):
        return form.up, form.down.mT
    up = form.up
    if architecture in PAIRED_ROTARY:
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        count = heads.get(form.path.rpartition(".")[2])
        if count is not None:
            up = pair_rotary_rows(up, count)
    return form.down, up


def pair_rotary_rows(rows: Tensor, heads: int) -> Tensor:
    """Rows of a projection (heads · head size first) from transformers' rotary order to llama.cpp's.

    Within a head of size h, transformers rotates row i with row i + h/2, llama.cpp row 2i with row 2i + 1.
    """
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def _write(path: Path, architecture: str, alpha: int, tensors: dict[str, Tensor], dtype: str) -> None:
    gguf = _import_gguf()
    kinds = {
        "float32": gguf.GGMLQuantizationType.F32,
        "float16": gguf.GGMLQuantizationType.F16,
        "bfloat16": gguf.GGMLQuantizationType.BF16,
    }
    writer = gguf.GGUFWriter(path, architecture)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
        for name, tensor in tensors.items():
            data = gguf.quants.quantize(tensor.contiguous().numpy(), kinds[dtype])
            writer.add_tensor(name, data, raw_dtype=kinds[dtype])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
