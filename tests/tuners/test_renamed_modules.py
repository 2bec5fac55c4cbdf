"""Adapters of vision-language models whose modules transformers has renamed since: loaded without a ``key_mapping``."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from lorma import LormaConfig, TLoraConfig
from lorma.methods.tlora.tuner.model import _checksum, _layers
from lorma.training.inference import load_adapter

NOW, ONCE = "model.language_model.", "language_model.model."


@pytest.fixture(scope="module")
def llava():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    vision = CLIPVisionConfig(num_hidden_layers=1, image_size=8, patch_size=4, **sizes)
    text = LlamaConfig(vocab_size=50, num_hidden_layers=2, num_key_value_heads=2, **sizes)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text)).eval()


def older_adapter(base, method, folder):
    """An adapter in a file with the names of transformers 4, and the adapted model."""
    model = get_peft_model(copy.deepcopy(base), method(r=2, target_modules=r".*language_model.*q_proj")).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    if method is TLoraConfig:
        layers = _layers(model, "default")
        for layer in layers:
            layer.drawn_as["default"] = layer.layer_name.replace(NOW, ONCE)
            layer.redraw("default")
        layers[0].tlora_checksum.put("default", _checksum(layers, "default"), saved=True)
    model.save_pretrained(folder)
    path = folder / "adapter_model.safetensors"
    save_file({name.replace(f"model.{NOW}", f"model.{ONCE}"): tensor for name, tensor in load_file(path).items()}, path)
    assert all(f"base_model.model.{ONCE}" in name for name in load_file(path))
    return model


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("method", [LoraConfig, LormaConfig, TLoraConfig])
def test_an_older_adapter_is_loaded_as_loras(method, quick, llava, tmp_path):
    ids = torch.arange(8)[None]
    want = older_adapter(llava, method, tmp_path / "older")(input_ids=ids).logits
    loaded = PeftModel.from_pretrained(copy.deepcopy(llava), tmp_path / "older", low_cpu_mem_usage=quick).eval()
    assert_close(loaded(input_ids=ids).logits, want, rtol=0, atol=1e-6)
    ours = load_adapter(copy.deepcopy(llava), tmp_path / "older")
    assert_close(ours(input_ids=ids).logits, want, rtol=0, atol=1e-6)
    loaded.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(copy.deepcopy(llava), tmp_path / "again").eval()
    assert_close(again(input_ids=ids).logits, want, rtol=0, atol=1e-6)


def test_names_of_no_renaming_are_refused(llava, tmp_path):
    older_adapter(llava, LormaConfig, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name.replace(ONCE, "language.model."): tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="which the adapted model does not have"):
        PeftModel.from_pretrained(copy.deepcopy(llava), tmp_path)
