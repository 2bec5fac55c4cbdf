"""What the parameters of adapters are called, in the model and in files, and files written before the names changed."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from lorma import LormaConfig, TLoraConfig
from lorma.adapters.folder import read_adapter
from lorma.methods.bottleneck.tuner import BottleneckConfig
from lorma.methods.svft.tuner import SvftConfig

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
OLD = Path(__file__).parent / "old_adapters"
METHODS = ("plus", "permutation", "tlora", "tlora_whole", "svft", "bottleneck")
WHERE = {"target_modules": ["q_proj", "down_proj"], "r": 2}
CONFIGS = {
    "lora": LoraConfig(**WHERE),
    "plus": LormaConfig(**WHERE, use_dora=True),
    "permutation": LormaConfig(**WHERE, inflation="permutation"),
    "tlora": TLoraConfig(**WHERE),
    "tlora_whole": TLoraConfig(**WHERE, save_projection=True),
    "svft": SvftConfig(**WHERE),
    "bottleneck": BottleneckConfig(**WHERE),
}
old_adapters = pytest.mark.parametrize("method", METHODS)


@pytest.fixture
def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, num_hidden_layers=1, **sizes))


def tensors(model, name):
    """An adapter's tensors by their names in files."""
    found = get_peft_model_state_dict(model, adapter_name=name)
    return {key.removeprefix("base_model.model."): value for key, value in found.items()}


def assert_holds(model, folder, name="default"):
    stored = {
        k.removeprefix("base_model.model."): v for k, v in load_file(folder / "adapter_model.safetensors").items()
    }
    found = tensors(model, name)
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[key], stored[key]) for key in stored)


@pytest.mark.parametrize("method", CONFIGS)
def test_every_tensor_of_an_adapter_has_the_shape_of_a_name_of_lora(llama, method):
    model = get_peft_model(llama, copy.deepcopy(CONFIGS[method]))
    before = set(dict(model.named_parameters())) | set(dict(model.named_buffers()))
    model.add_adapter("ref", model.peft_config["default"])  # one configuration for both, as TRL does it
    new = (set(dict(model.named_parameters())) | set(dict(model.named_buffers()))) - before
    mine = {name for name in before if ".default." in name}
    assert len(mine) == len(new) - ("tlora_checksum" in str(new)) + ("tlora_checksum" in str(mine)) > 0
    assert {name.replace(".default.", ".ref.") for name in mine} == new
    assert all(name.endswith((".ref.weight", ".ref.lora_magnitude_vector")) for name in new)
    assert all(".default." in name for name, p in model.named_parameters() if p.requires_grad)
    model.delete_adapter("ref")
    assert before == set(dict(model.named_parameters())) | set(dict(model.named_buffers()))


@old_adapters
def test_old_adapters_load_with_peft(llama, method):
    folder = OLD / method
    model = PeftModel.from_pretrained(copy.deepcopy(llama), folder)
    assert_holds(model, folder)
    model.load_adapter(folder, "again", low_cpu_mem_usage=True)
    assert_holds(model, folder, "again")
    other = get_peft_model(llama, read_adapter(folder).config)
    set_peft_model_state_dict(other, load_peft_weights(folder))
    assert_holds(other, folder)


@old_adapters
def test_old_adapters_load_with_transformers(llama, method):
    folder = OLD / method
    info = llama.load_adapter(str(folder), adapter_name="mine")
    assert not info.missing_keys
    assert not info.unexpected_keys
    assert_holds(llama, folder, "mine")


@old_adapters
def test_old_state_dicts_load(llama, method):
    folder = OLD / method
    model = get_peft_model(llama, read_adapter(folder).config)
    state = load_file(folder / "state_dict.safetensors")
    found = model.load_state_dict(state, strict=False)
    assert not found.unexpected_keys
    assert not [key for key in found.missing_keys if ".default" in key]
    assert_holds(model, folder)


@old_adapters
def test_files_keep_the_names_they_had(llama, method, tmp_path):
    model = PeftModel.from_pretrained(llama, OLD / method)
    model.save_pretrained(tmp_path)
    name = "adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (OLD / method / name).read_bytes()


@old_adapters
def test_adapters_go_through_transformers_and_back(llama, method, tmp_path):
    base = copy.deepcopy(llama)
    llama.load_adapter(str(OLD / method))
    llama.save_pretrained(tmp_path)
    base.load_adapter(str(tmp_path))
    assert_holds(base, OLD / method)
    base.delete_adapter("default")
    assert not [name for name, _ in base.named_parameters() if ".default" in name]
