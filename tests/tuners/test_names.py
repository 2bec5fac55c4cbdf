"""Adapters that are saved from models with wrappers or older adapters around and in them: each folder can be loaded."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.testing import assert_close

from lorma import InputError, LormaConfig, TLoraConfig
from lorma.adapters.folder import read_adapter
from lorma.methods.bottleneck.tuner import BottleneckConfig
from lorma.methods.lorma.tuner.hotswap import hotswap_adapter
from lorma.training.inference import load_adapter
from lorma.tuners.names import by_unwrapped, unwrapped

METHODS = [LormaConfig, TLoraConfig, BottleneckConfig]
pytestmark = [
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Calling register_constant:FutureWarning"),
]


@pytest.fixture
def x():
    return torch.randint(0, 60, (2, 5), generator=torch.Generator().manual_seed(0))


def train(model):
    """Other numbers in everything that trains."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


def loaded_both_ways(base, folder):
    return [PeftModel.from_pretrained(copy.deepcopy(base), folder).eval(), load_adapter(copy.deepcopy(base), folder)]


def twice(base, method):
    train(get_peft_model(base, method(r=2, target_modules=["query", "value"])))
    return get_peft_model(base, method(r=3, target_modules=["value", "key"]))


def twice_on_the_adapted_model(base, method):
    model = train(get_peft_model(base, method(r=2, target_modules=["query", "value"])))
    return get_peft_model(model, method(r=3, target_modules=["value"]))


def twice_with_a_trained_head_the_first_time(base, method):
    train(get_peft_model(base, method(r=2, target_modules=["query"], modules_to_save=["classifier"])))
    return get_peft_model(base, method(r=3, target_modules=["value"]))


def twice_with_a_head_of_its_own(base, method):
    train(get_peft_model(base, method(r=2, target_modules=["query"], modules_to_save=["classifier"])))
    return get_peft_model(base, method(r=3, target_modules=["value"], modules_to_save=["classifier"]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "make",
    [twice, twice_on_the_adapted_model, twice_with_a_trained_head_the_first_time, twice_with_a_head_of_its_own],
)
def test_a_second_adapter_replaces_the_first_whole(make, method, bert, x, tmp_path):
    model = train(make(copy.deepcopy(bert), method))
    model.save_pretrained(tmp_path)
    for loaded in loaded_both_ways(bert, tmp_path):
        assert_close(loaded(x).logits, model(x).logits, rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_second_adapter_begins_as_on_the_base(method, bert, x):
    base = copy.deepcopy(bert)
    train(get_peft_model(base, method(r=2, target_modules=["query", "value"], modules_to_save=["classifier"])))
    again = get_peft_model(base, method(r=3, target_modules=["key"])).eval()
    assert_close(again(x).logits, bert(x).logits, rtol=0, atol=1e-6)


def test_the_adapter_of_another_method_stays_and_is_no_part_of_the_file(bert, x, tmp_path):
    base = copy.deepcopy(bert)
    train(get_peft_model(base, LoraConfig(r=2, target_modules=["query"])))
    model = train(get_peft_model(base, LormaConfig(r=3, target_modules=["value"])))
    model.save_pretrained(tmp_path)
    assert {
        name.rpartition(".")[0].rpartition(".")[2] for name in load_file(tmp_path / "adapter_model.safetensors")
    } <= {
        "value",
        "lorma_A",
        "lorma_B",
    }
    PeftModel.from_pretrained(copy.deepcopy(bert), tmp_path)


def test_targets_that_are_refused_leave_the_older_adapter(bert, x):
    base = copy.deepcopy(bert)
    first = train(get_peft_model(base, LormaConfig(r=2, target_modules=["query"])))
    before = first(x).logits
    with pytest.raises(ValueError, match="target_parameters"):
        get_peft_model(base, BottleneckConfig(target_parameters=["a"]))
    assert_close(first(x).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bias", ["none", "all"])
def test_an_adapter_made_on_a_compiled_base(method, bias, bert, x, tmp_path):
    model = get_peft_model(torch.compile(copy.deepcopy(bert)), method(r=2, target_modules=["query"], bias=bias))
    train(model).save_pretrained(tmp_path)
    assert not any("_orig_mod" in name for name in read_adapter(tmp_path).tensors)
    assert bias == "all" or not any("_orig_mod" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    want = model.base_model.model._orig_mod(x).logits
    for loaded in loaded_both_ways(bert, tmp_path):
        assert_close(loaded(x).logits, want, rtol=0, atol=0)
    compiled = PeftModel.from_pretrained(torch.compile(copy.deepcopy(bert)), tmp_path).eval()
    assert_close(compiled.base_model.model._orig_mod(x).logits, want, rtol=0, atol=0)


def test_an_adapter_is_swapped_into_one_on_a_compiled_base(bert, x, tmp_path):
    config = LormaConfig(r=2, target_modules=["query"])
    plain = train(get_peft_model(copy.deepcopy(bert), config))
    plain.save_pretrained(tmp_path)
    model = get_peft_model(torch.compile(copy.deepcopy(bert)), config).eval()
    hotswap_adapter(model, tmp_path)
    assert_close(model.base_model.model._orig_mod(x).logits, plain(x).logits, rtol=0, atol=0)


def test_a_trained_head_on_a_compiled_base_is_read_by_lorma(bert, x, tmp_path):
    config = LormaConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    model = train(get_peft_model(torch.compile(copy.deepcopy(bert)), config))
    model.save_pretrained(tmp_path)
    loaded = load_adapter(copy.deepcopy(bert), tmp_path)
    assert_close(loaded(x).logits, model.base_model.model._orig_mod(x).logits, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize("method", [LoraConfig, LormaConfig, TLoraConfig])
def test_copies_of_adapted_embeddings_that_peft_saves_are_read(method, gpt2, x, tmp_path):
    model = train(get_peft_model(copy.deepcopy(gpt2), method(r=2, target_modules=["c_attn", "wte"])))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    for loaded in loaded_both_ways(gpt2, tmp_path):
        assert_close(loaded(x).logits, model(x).logits, rtol=0, atol=1e-6)


def test_names_without_wrappers():
    assert unwrapped("base_model.model._orig_mod.up.lorma_A") == "base_model.model.up.lorma_A"
    assert unwrapped("base_model.model.base_model.model.up.lorma_A") == "base_model.model.up.lorma_A"
    assert unwrapped("base_model.model.model.up.lorma_A") == "base_model.model.model.up.lorma_A"
    with pytest.raises(InputError, match="name the same weight"):
        by_unwrapped(["base_model.model.up", "base_model.model._orig_mod.up"])
