"""Reading a base model's weights one at a time, under the names that the model gives them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorma import InputError, LormaConfig
from lorma.export import Base, export_lora
from lorma.models.structure import meta_model
from lorma.models.weights import LoadedWeights, SafetensorsWeights, open_weights

AUTO = {"bert": "AutoModelForSequenceClassification", "vit": "AutoModelForImageClassification"}


def opened(folder, name):
    base = Base(str(folder), auto_model=AUTO.get(name, "AutoModelForCausalLM"))
    model = meta_model(base)
    assert all(parameter.is_meta for parameter in model.parameters())
    return model, open_weights(base, model)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_every_weight_is_the_models(name, bases):
    folder, loaded, _ = bases[name]
    model, weights = opened(folder, name)
    assert isinstance(weights, SafetensorsWeights)
    known = dict(loaded.named_parameters(remove_duplicate=False))
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if path in weights:
            assert torch.equal(weights.read(path), known[path])
            assert weights.info(path).shape == tuple(parameter.shape)
    missing = {path for path in known if path not in weights}
    assert missing == ({"classifier.weight", "classifier.bias"} if name == "bert" else set())
    for path in missing:
        with pytest.raises(InputError, match=f"no weight for {path}"):
            weights.read(path)


def test_a_model_loaded_whole_gives_the_same(bases):
    folder, loaded, _ = bases["bert"]
    base = Base(str(folder), auto_model=AUTO["bert"])
    weights = LoadedWeights(base, type(loaded))
    assert torch.equal(weights.read("bert.pooler.dense.weight"), loaded.bert.pooler.dense.weight)
    assert "classifier.weight" not in weights


def changed(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.fixture
def copied(bases, tmp_path):
    def copy(name):
        shutil.copytree(bases[name][0], tmp_path / "copy")
        return tmp_path / "copy"

    return copy


def test_a_single_file_goes_before_an_index(copied):
    """As transformers reads it; the shards that the index names may be gone."""
    folder = copied("llama")
    other = AutoModelForCausalLM.from_pretrained(folder)
    other.model.norm.weight.data.fill_(7.0)
    other.save_pretrained(folder / "other")
    (folder / "other" / "model.safetensors").rename(folder / "model.safetensors")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder).model.norm.weight, other.model.norm.weight)
    for shard in folder.glob("model-*.safetensors"):
        shard.unlink()
    _, weights = opened(folder, "llama")
    assert torch.equal(weights.read("model.norm.weight"), other.model.norm.weight)


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/passwd", "weights.bin", 7])
def test_an_index_cannot_lead_elsewhere(shard, copied):
    folder = copied("llama")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = shard
    index.write_text(json.dumps(content))
    with pytest.raises(InputError, match="which is no safetensors file beside it"):
        opened(folder, "llama")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "only safetensors are read"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 40), "truncated or not a safetensors file"),
        (lambda f: save_file({"other": torch.ones(1)}, f / "model.safetensors"), "has no weight of it, but other"),
        (lambda f: (f / "config.json").unlink(), "cannot be read"),
        (lambda f: (f / "config.json").write_text("{}"), "cannot be read"),
        (lambda f: changed(f, n_layer="two"), "cannot be read: .*n_layer.* expected int"),
        (lambda f: changed(f, n_head=0), "cannot be (read|built): "),
    ],
    ids=["missing", "broken", "foreign", "no-config", "empty-config", "wrong-type", "no-heads"],
)
def test_bases_that_cannot_be_used(spoil, reason, copied):
    folder = copied("gpt2")
    spoil(folder)
    with pytest.raises(InputError, match=reason) as error:
        opened(folder, "gpt2")
    assert "\n" not in str(error.value)


def test_a_weight_of_another_shape_is_refused(copied, exported_case, tmp_path):
    _, _, _, _, adapter = exported_case("gpt2", LormaConfig(target_modules=["c_attn"]))
    folder = copied("gpt2")
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.h.0.attn.c_attn.weight"] = torch.ones(32, 90)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"h\.0\.attn\.c_attn\.weight is \(32, 90\), not \(32, 96\)"):
        export_lora(adapter, tmp_path / "lora", base=Base(str(folder), auto_model="AutoModelForCausalLM"))


def test_only_the_adapted_weights_are_read(exported_case, bases, copied, tmp_path):
    _, _, _, _, adapter = exported_case("llama", LormaConfig(target_modules=["k_proj"], layers_to_transform=[1]))
    folder = copied("llama")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = index["model.layers.1.self_attn.k_proj.weight"]
    for shard in set(index.values()) - {needed}:
        (folder / shard).unlink()
    export_lora(adapter, tmp_path / "lora", base=Base(str(folder), auto_model="AutoModelForCausalLM"))
    written = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {key.split(".lora_")[0].split("layers.")[1] for key in written} == {"1.self_attn.k_proj"}
