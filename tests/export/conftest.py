"""Tiny base models: saved, with a batch."""

import copy

import pytest
import torch

MODELS = ("bert", "llama", "gpt2", "vit")


@pytest.fixture(scope="session")
def bases(tmp_path_factory, tiny_bert):
    """By name: the folder, the model as transformers loads it, and a batch. Llama's weights lie in shards."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        AutoModelForSequenceClassification,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        ViTConfig,
        ViTForImageClassification,
    )

    torch.manual_seed(0)
    ids = {"input_ids": torch.randint(3, 60, (2, 7))}
    sizes = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    made = {
        "llama": LlamaForCausalLM(
            LlamaConfig(
                **sizes,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=48,
                tie_word_embeddings=True,
            )
        ),
        "gpt2": GPT2LMHeadModel(GPT2Config(**sizes, n_embd=32, n_layer=2, n_head=2, n_positions=64)),
        "vit": ViTForImageClassification(
            ViTConfig(
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=48,
                image_size=16,
                patch_size=8,
                num_labels=3,
            )
        ),
    }
    auto = {"vit": AutoModelForImageClassification}
    found = {}
    for name, model in made.items():
        folder = tmp_path_factory.mktemp(f"tiny-{name}")
        for parameter in model.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(folder, max_shard_size="20KB" if name == "llama" else "1GB")
        found[name] = (folder, auto.get(name, AutoModelForCausalLM).from_pretrained(folder).eval(), ids)
    found["vit"] = (*found["vit"][:2], {"pixel_values": torch.randn(2, 3, 16, 16)})
    torch.manual_seed(0)
    bert = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2).eval()
    found["bert"] = (tiny_bert, bert, {"input_ids": torch.randint(3, 40, (2, 7))})
    assert len(list(found["llama"][0].glob("model-*.safetensors"))) > 2
    return found


@pytest.fixture
def exported_case(bases, tmp_path):
    """``(model, config)`` → the base's folder, its model and batch, the adapted model, and the adapter's folder."""
    from export_cases import filled

    def make(name, config):
        folder, model, batch = bases[name]
        adapted = filled(model, config)
        adapter = tmp_path / "adapter"
        adapted.save_pretrained(adapter, save_embedding_layers=False)
        return folder, copy.deepcopy(model), batch, adapted, adapter

    return make
