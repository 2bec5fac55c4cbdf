"""Tiny base models as GGUF files, so that llama.cpp can be asked what it makes of an adapter file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TOKENS = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GEMMA3_ROTARY = {
    kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
}


def tiny(kind: str) -> Any:
    """A model of a few thousand random weights, in evaluation mode."""
    import transformers as t

    grouped = {**SIZES, **TOKENS, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}
    makers = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**grouped)),
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**grouped, sliding_window=None)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**grouped)),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**grouped)),
        "gemma": lambda: t.GemmaForCausalLM(t.GemmaConfig(**grouped, hidden_activation="gelu_pytorch_tanh")),
        "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**grouped, query_pre_attn_scalar=8, sliding_window=256)),
        "gemma3_text": lambda: t.Gemma3ForCausalLM(
            t.Gemma3TextConfig(**grouped, query_pre_attn_scalar=8, sliding_window=256, rope_parameters=GEMMA3_ROTARY)
        ),
        "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**{k: v for k, v in grouped.items() if k != "head_dim"})),
        "phi": lambda: t.PhiForCausalLM(t.PhiConfig(**SIZES, **TOKENS, max_position_embeddings=256)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=256)),
    }
    torch.manual_seed(0)
    model = makers[kind]().eval()
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


def to_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows from (i, i + h/2) to (2i, 2i + 1), one by one."""
    size = weight.shape[0] // heads
    order = [head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return weight[order]


def write_base(path: Path, model: Any, architecture: str, *, letters: bool = False) -> None:
    """A model in float32, without a tokenizer or with one whose tokens are letters."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_vocab_size(config.vocab_size)
    if letters:
        tokens = ["<pad>", "<s>", "</s>", *"Ġabcdefghijklmnopqrstuvwxyz.,", "th"]
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([*tokens, *(f"<{i}>" for i in range(len(tokens), config.vocab_size))])
        writer.add_token_merges(["t h"])
        writer.add_bos_token_id(config.bos_token_id)
        writer.add_eos_token_id(config.eos_token_id)
        writer.add_pad_token_id(config.pad_token_id)
    else:
        writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(256)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(128 if architecture == "gpt2" else config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(shared)
    writer.add_key_length(size)
    writer.add_value_length(size)
    if architecture in ("gpt2", "phi2"):
        writer.add_layer_norm_eps(1e-5)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if architecture != "gpt2":
        rotary = config.rope_parameters
        rotary = rotary.get("full_attention", rotary)
        writer.add_rope_dimension_count(int(size * rotary.get("partial_rotary_factor", 1.0)))
        writer.add_rope_freq_base(rotary["rope_theta"])
    if architecture in ("gemma2", "gemma3"):
        writer.add_sliding_window(256)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if architecture == "phi3":
        writer.add_rope_scaling_orig_ctx_len(256)
        writer.add_sliding_window(0)
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], config.num_hidden_layers)
    tied = set(model.all_tied_weights_keys)
    for name, tensor in model.state_dict().items():
        if name in tied and architecture != "phi3":
            continue
        if architecture == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.T
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + 1
        if architecture == "llama" and "q_proj" in name:
            tensor = to_pairs(tensor, heads)
        if architecture == "llama" and "k_proj" in name:
            tensor = to_pairs(tensor, shared)
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target, name
        writer.add_tensor(target, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def answers(base: Path, ids: list[int], adapter: Path | None = None) -> torch.Tensor:
    """llama.cpp's logits at every token."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(base),
        lora_path=None if adapter is None else str(adapter),
        n_ctx=256,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        type_k=0,
        type_v=0,
        verbose=False,
    )
    model.eval(ids)
    return torch.tensor(model.scores[: len(ids)])
