"""One adapter that equals two, made from their files."""

import copy
import json

import pytest
import torch
from export_cases import filled
from helpers import adapted
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from lorma import InputError, LormaConfig, TLoraConfig
from lorma.export.compose import compose
from lorma.files import META_FILE
from lorma.models.structure import Base
from tuners.conftest import Mlp

KINDS = {
    "pre": {},
    "post": {"side": "post"},
    "mixed ranks": {"rank_pattern": {"up": 3}, "alpha_pattern": {"conv": 5}, "use_rslora": True},
    "fused": {"fused_projections": {"up": {"splits": [4, 6], "adapt": [1]}}},
    "fused post": {"side": "post", "fused_projections": {"up": {"splits": [4, 3, 3], "adapt": [0, 2]}}},
}


@pytest.fixture
def double():
    torch.manual_seed(0)
    return Mlp().double()


def saved(model, folder, seed, **config):
    from helpers import randomise

    peft_model = adapted(model, **{"r": 2, **config})
    randomise(peft_model, seed=seed)
    peft_model.save_pretrained(folder)
    return folder


def both(model, first, second):
    peft_model = PeftModel.from_pretrained(copy.deepcopy(model), first, adapter_name="first")
    peft_model.load_adapter(second, "second")
    peft_model.base_model.set_adapter(["first", "second"])
    return peft_model.eval()


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_the_product_equals_both_in_order(config, double, tmp_path):
    first = saved(double, tmp_path / "a", 2, **config)
    second = saved(double, tmp_path / "b", 3, **(config | {"r": 4, "lorma_alpha": 3}))
    x = torch.randn(5, 6, dtype=torch.float64)
    for a, b, name in ((first, second, "ab"), (second, first, "ba")):
        compose(a, b, tmp_path / name)
        one = PeftModel.from_pretrained(copy.deepcopy(double), tmp_path / name).eval()
        torch.testing.assert_close(one(x), both(double, a, b)(x), rtol=0, atol=1e-12)
    other = PeftModel.from_pretrained(copy.deepcopy(double), tmp_path / "ba").eval()
    assert (one(x) - both(double, first, second)(x)).abs().max() > 1e-6
    assert {layer.r["default"] for layer in other.modules() if hasattr(layer, "lorma_A")} <= {5, 6, 7}


def test_layers_that_only_one_adapter_has(double, tmp_path):
    first = saved(double, tmp_path / "a", 2, target_modules=["up", "gate"])
    second = saved(double, tmp_path / "b", 3, target_modules=["gate", "conv"])
    compose(first, second, tmp_path / "c")
    one = PeftModel.from_pretrained(copy.deepcopy(double), tmp_path / "c").eval()
    x = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(one(x), both(double, first, second)(x), rtol=0, atol=1e-12)
    assert one.base_model.model.up.r["default"] == 2
    assert one.base_model.model.gate.r["default"] == 4


def test_heads(double, tmp_path):
    first = saved(double, tmp_path / "a", 2, modules_to_save=["head"])
    second = saved(double, tmp_path / "b", 3)
    compose(first, second, tmp_path / "c")
    name = "base_model.model.head.weight"
    kept = load_file(first / "adapter_model.safetensors")[name]
    assert torch.equal(load_file(tmp_path / "c" / "adapter_model.safetensors")[name], kept)
    third = saved(double, tmp_path / "d", 4, modules_to_save=["head"])
    path = third / "adapter_model.safetensors"
    save_file(load_file(path) | {name: kept + 1}, path)
    with pytest.raises(InputError, match="both adapters have trained head.weight whole.*--heads-from"):
        compose(first, third, tmp_path / "e")
    for heads, expected in (("first", kept), ("second", kept + 1)):
        compose(first, third, tmp_path / "e", heads_from=heads)
        assert torch.equal(load_file(tmp_path / "e" / "adapter_model.safetensors")[name], expected)


def test_side_auto_needs_the_structure_of_the_base(tiny_bert, tmp_path):
    torch.manual_seed(0)
    bert = AutoModelForSequenceClassification.from_pretrained(tiny_bert).double().eval()
    config = {"side": "auto", "target_modules": ["query", "intermediate.dense"]}
    first = saved(bert, tmp_path / "a", 2, **config)
    second = saved(bert, tmp_path / "b", 3, **(config | {"r": 3}))
    with pytest.raises(InputError, match=r"side='auto': the files do not say which side of .*--base"):
        compose(first, second, tmp_path / "c")
    compose(first, second, tmp_path / "c", base=Base(str(tiny_bert), auto_model="AutoModelForSequenceClassification"))
    one = PeftModel.from_pretrained(copy.deepcopy(bert), tmp_path / "c").eval()
    ids = torch.arange(6)[None]
    torch.testing.assert_close(one(ids).logits, both(bert, first, second)(ids).logits, rtol=0, atol=1e-12)
    assert one.peft_config["default"].side == "auto"
    with pytest.raises(InputError, match="the base model has no layer bert.encoder"):
        compose(first, second, tmp_path / "d", base=Base(str(tiny_bert), auto_model="AutoModel"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inflation": "permutation"}, "has inflation='permutation'; only LoRMA adapters with inflation='plus'"),
        ({"use_dora": True}, "has use_dora=True, which is no product of low rank"),
        ({"side": "post"}, "the first adapter has side='pre', the second 'post'"),
        ({"fused_projections": {"up": {"splits": [5, 5]}}}, "differ in fused_projections"),
        ({"base_model_name_or_path": "other/model"}, "differ in base_model_name_or_path"),
    ],
)
def test_refusals(changes, message, double, tmp_path):
    first, changes = saved(double, tmp_path / "a", 2), dict(changes)
    name = changes.pop("base_model_name_or_path", None)
    second = saved(double, tmp_path / "b", 3, **changes)
    for folder, base in ((first, "some/model"), (second, name)):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
    with pytest.raises(InputError, match=message):
        compose(first, second, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_tlora_is_refused_with_the_reason(double, tmp_path):
    from peft import get_peft_model

    get_peft_model(copy.deepcopy(double), TLoraConfig(r=2, target_modules=["up"])).save_pretrained(tmp_path / "a")
    with pytest.raises(InputError, match="is a TLoRA adapter, which adds α·ABC"):
        compose(tmp_path / "a", saved(double, tmp_path / "b", 3), tmp_path / "c")


def test_the_command(double, tmp_path, cli):
    first, second = saved(double, tmp_path / "a", 2), saved(double, tmp_path / "b", 3)
    done = cli("compose", first, second, "-o", tmp_path / "c")
    assert done.code == 0, done.err
    assert "one adapter of rank 4 that equals" in done.out
    again = cli("compose", first, second, "-o", tmp_path / "c")
    assert again.code == 2
    assert "--overwrite" in again.err
    assert cli("compose", first, second, "-o", tmp_path / "c", "--overwrite").code == 0
    assert len({file.stat().st_mode for file in (tmp_path / "c").iterdir()}) == 1
    (tmp_path / "c" / "notes.md").write_text("mine")
    foreign = cli("compose", first, second, "-o", tmp_path / "c", "--overwrite")
    assert foreign.code == 2
    assert "holds other files than those of an adapter ('notes.md')" in foreign.err
    assert (tmp_path / "c" / "notes.md").read_text() == "mine"
    assert cli("compose", first, second, "-o", tmp_path / "c", "--heads-from", "third").code == 2
    assert cli("compose", first, tmp_path / "nothing", "-o", tmp_path / "d").code == 2


def test_biases_of_the_second_adapter_are_kept(double, tmp_path):
    first = saved(double, tmp_path / "1", 1)
    second = saved(double, tmp_path / "2", 2, bias="lorma_only")
    assert compose(first, second, tmp_path / "both").config.bias == "lorma_only"


def named(folder, name):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))
    return folder


def test_one_base_may_be_written_in_several_ways(double, tmp_path, monkeypatch):
    first, second = saved(double, tmp_path / "a", 2), saved(double, tmp_path / "b", 3)
    (tmp_path / "base").mkdir()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    named(first, str(tmp_path / "base"))
    for name in (f"{tmp_path}/base/", "base", "./base"):
        compose(first, named(second, name), tmp_path / "c")
    for name in (str(tmp_path / "other"), "organisation/model"):
        with pytest.raises(InputError, match="differ in base_model_name_or_path"):
            compose(first, named(second, name), tmp_path / "d")


def test_a_base_that_is_given_need_not_be_the_one_the_adapters_name(tiny_bert, tmp_path):
    bert = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    first = named(saved(bert, tmp_path / "a", 2, target_modules=["query"]), "/gone/base")
    second = named(saved(bert, tmp_path / "b", 3, target_modules=["query"]), "organisation/model")
    compose(first, second, tmp_path / "c", base=Base(str(tiny_bert), auto_model="AutoModelForSequenceClassification"))
    assert (tmp_path / "c").is_dir()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_a_module_that_one_adapts_and_the_other_trains_whole(module, bases, tmp_path):
    folder, model, _ = bases["llama"]
    one, two = tmp_path / "adapts", tmp_path / "whole"
    filled(model, LormaConfig(r=2, target_modules=["q_proj", module])).save_pretrained(one, save_embedding_layers=True)
    filled(model, LormaConfig(r=2, target_modules=["q_proj"], modules_to_save=[module])).save_pretrained(two)
    for first, second in ((one, two), (two, one)):
        for base in (None, Base(str(folder), auto_model="AutoModelForCausalLM")):
            with pytest.raises(InputError, match=f"{one} adapts .*{module}, which {two} has trained whole"):
                compose(first, second, tmp_path / "c", base=base)
    assert not (tmp_path / "c").exists()


def test_a_layer_inside_a_module_that_is_trained_whole(bases, tmp_path):
    _, model, _ = bases["llama"]
    one, two = tmp_path / "adapts", tmp_path / "whole"
    filled(model, LormaConfig(r=2, target_modules=["q_proj", "up_proj"])).save_pretrained(one)
    filled(model, LormaConfig(r=2, target_modules=["q_proj"], modules_to_save=["mlp"])).save_pretrained(two)
    with pytest.raises(InputError, match="layers.0.mlp.up_proj, which .* has trained whole"):
        compose(two, one, tmp_path / "c")


def test_a_rank_that_could_not_be_read_again_is_refused_before_anything_is_written(tmp_path):
    from lorma.adapters.folder import WIDE_RANK

    folder, rank = tmp_path / "a", WIDE_RANK // 2 + 1
    folder.mkdir()
    name = "base_model.model.q.lorma_"
    save_file({f"{name}A": torch.ones(rank, 1), f"{name}B": torch.ones(1, rank)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORMA", "r": rank, "target_modules": ["q"]}))
    with pytest.raises(InputError, match=f"q: the product would have rank {2 * rank}; allowed: .* 1, or {WIDE_RANK}"):
        compose(folder, folder, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_the_description_of_the_task_is_not_read_through_a_link(double, tmp_path, cli):
    first, second = saved(double, tmp_path / "a", 2), saved(double, tmp_path / "b", 3)
    (tmp_path / "secret").write_text(json.dumps({"key": "secret"}))
    (second / META_FILE).symlink_to(tmp_path / "secret")
    done = cli("compose", first, second, "-o", tmp_path / "c")
    assert done.code == 2
    assert f"{META_FILE} is a link that leads out of the folder" in done.err
    assert not (tmp_path / "c").exists()
    (second / META_FILE).unlink()
    (first / META_FILE).write_text(json.dumps({"task": "ö"}))
    compose(first, second, tmp_path / "c")
    assert (tmp_path / "c" / META_FILE).read_bytes() == (first / META_FILE).read_bytes()
    (second / META_FILE).write_text(json.dumps({"task": "2"}))
    for heads, kept in ((None, second), ("first", first)):
        compose(first, second, tmp_path / "c", heads_from=heads)
        assert (tmp_path / "c" / META_FILE).read_bytes() == (kept / META_FILE).read_bytes()
