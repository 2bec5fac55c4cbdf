"""Adapter files and models that do not fit: refused by name, before anything is computed with them."""

import copy
import json
import re

import pytest
import torch
from helpers import TARGETS, adapted
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from lorma import LormaConfig


@pytest.fixture
def folder(mlp, tmp_path):
    adapted(mlp).save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_truncated_file(mlp, folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is truncated or not a safetensors file"):
        PeftModel.from_pretrained(mlp, folder)
    path.write_bytes(b"PK\x03\x04 something else altogether")
    with pytest.raises(ValueError, match="is truncated or not a safetensors file"):
        PeftModel.from_pretrained(mlp, folder)


def test_weights_of_another_method(mlp, folder, tmp_path_factory):
    lora = tmp_path_factory.mktemp("lora")
    get_peft_model(copy.deepcopy(mlp), LoraConfig(target_modules=["up"])).save_pretrained(lora)
    (folder / "adapter_model.safetensors").write_bytes((lora / "adapter_model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="holds no weights named lorma_A.*lora_A"):
        PeftModel.from_pretrained(mlp, folder)


def test_shapes_that_do_not_fit_name_layer_expected_and_found(mlp, folder):
    other = copy.deepcopy(mlp)
    other.up, other.gate = nn.Linear(6, 9), nn.Linear(6, 9)
    other.conv.weight = nn.Parameter(torch.zeros(9, 6))
    message = (
        r"up.lorma_A.default.weight: copying a param with shape .*\[8, 10\].* current model is torch.Size\(\[8, 9\]\)"
    )
    with pytest.raises(RuntimeError, match=message):
        PeftModel.from_pretrained(copy.deepcopy(other), folder)
    with (
        pytest.warns(UserWarning, match="Some weights of PeftModel were not initialized"),
        pytest.warns(UserWarning, match="Found missing adapter keys"),
    ):
        loaded = PeftModel.from_pretrained(other, folder, ignore_mismatched_sizes=True)
    assert loaded.base_model.model.up.lorma_A["default"].shape == (8, 9)


def test_missing_and_foreign_tensors(mlp, folder):
    rewrite(folder, lambda tensors: tensors.pop("base_model.model.up.lorma_B"))
    with pytest.warns(UserWarning, match="missing adapter keys.*up.lorma_B"):
        PeftModel.from_pretrained(copy.deepcopy(mlp), folder)
    adapted(mlp).save_pretrained(folder)
    rewrite(folder, lambda tensors: tensors.update({"base_model.model.down.lorma_A": torch.zeros(8, 2)}))
    with pytest.raises(ValueError, match="holds base_model.model.down.lorma_A, which the adapted model does not have"):
        PeftModel.from_pretrained(copy.deepcopy(mlp), folder)


def test_safe_merge_refuses_nan_and_changes_nothing(mlp):
    model = adapted(mlp)
    weights = {name: p.clone() for name, p in model.named_parameters() if "base_layer" in name}
    model.base_model.model.conv.lorma_B["default"].data[0, 0] = torch.nan
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            ValueError, match="NaNs detected in lorma_B of conv. The adapter default seems to be broken"
        ):
            merge(safe_merge=True)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights of conv"):
        model.base_model.model.conv.merge(safe_merge=True)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters() if name in weights)
    assert not model.base_model.model.up.merged


def test_quantised_weights_are_not_merged_silently(mlp):
    model = adapted(mlp, target_modules=["up"])
    layer = model.base_model.model.up
    layer.base_layer.weight = nn.Parameter(torch.zeros(10, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="the weight of up is stored as torch.int8; merging needs a floating-point"):
        layer.merge()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["qeury"], r"target_modules=['qeury'] matches no module of this model; closest names: query"),
        (["q"], "target_modules=['q'] matches no module of this model; closest names: query"),
        (["word"], "; closest names: word_embeddings"),
        (["type_embed"], "; closest names: token_type_embeddings"),
        (["nope"], "target_modules=['nope'] matches no module of this model; layers that can be adapted: "),
        ("query", "target_modules='query' matches no module of this model; a string is a regular expression"),
        (r".*\.qeury", r"target_modules='.*\\.qeury' matches no module of this model; closest names: query"),
    ],
)
def test_targets_that_match_nothing_are_named_with_what_is_near(targets, message, bert):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        get_peft_model(bert, LormaConfig(target_modules=targets))
    assert str(error.value).startswith("target_modules=")
    assert ("closest" in str(error.value)) is (targets != ["nope"])
    assert "Dropout" not in str(error.value)
    assert "dropout" not in str(error.value)


def test_targets_where_none_is_near_or_another_setting_is_at_fault(bert, mlp):
    with pytest.raises(
        ValueError, match=r"\['attention.wq'\] matches no .*; layers that can be adapted: conv, gate, head, up$"
    ):
        get_peft_model(mlp, LormaConfig(target_modules=["attention.wq"]))
    with pytest.raises(ValueError, match="layers_to_transform"):
        get_peft_model(bert, LormaConfig(target_modules=["query"], layers_to_transform=[7]))
    with pytest.raises(ValueError, match="specify `target_modules`"):
        get_peft_model(mlp, LormaConfig())


def test_unsupported_kinds_are_named(bert):
    with pytest.raises(ValueError, match=r"LayerNorm \(LayerNorm\) is not supported"):
        get_peft_model(copy.deepcopy(bert), LormaConfig(target_modules=["LayerNorm"]))
    with pytest.raises(ValueError, match="an nn.Embedding with max_norm changes its weight when read"):
        get_peft_model(nn.Sequential(nn.Embedding(5, 4, max_norm=1.0)), LormaConfig(target_modules=["0"]))
    with pytest.raises(
        ValueError, match=r"self_attn.out_proj is not supported: nn.MultiheadAttention reads this weight"
    ):
        get_peft_model(nn.TransformerEncoderLayer(8, 2), LormaConfig(target_modules=["self_attn.out_proj"]))
    config = LormaConfig(target_modules=[], target_parameters=["self_attn.in_proj_weight"])
    with pytest.raises(ValueError, match="in_proj_weight belongs to nn.MultiheadAttention; name it in target_modules"):
        get_peft_model(nn.TransformerEncoderLayer(8, 2), config)


def test_fan_in_fan_out_on_a_linear_layer_is_said_to_be_ignored(mlp):
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to True but up is a Linear"):
        get_peft_model(mlp, LormaConfig(target_modules=["up"], fan_in_fan_out=True))


def test_adapter_config_of_an_unknown_inflation(mlp, folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"inflation": "cyclic"}))
    with pytest.raises(ValueError, match="inflation='cyclic' is not allowed"):
        PeftModel.from_pretrained(mlp, folder)


def test_a_weight_that_overflows_leaves_no_layer_merged(mlp):
    model = adapted(mlp.half())
    model.base_model.model.conv.lorma_B["default"].data.fill_(1e30)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights of conv"):
        model.merge_adapter(safe_merge=True)
    assert not any(getattr(model.base_model.model, name).merged for name in TARGETS)


def test_layers_sharing_a_weight_are_unmerged(mlp):
    mlp.gate.weight = mlp.up.weight
    before = mlp.up.weight.detach().clone()
    model = adapted(mlp)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.up.base_layer.weight, before)


def test_a_dtype_change_while_merged(mlp):
    model = adapted(mlp)
    model.add_adapter("second", LormaConfig(target_modules=TARGETS))
    model.merge_adapter(["default"])
    model.to(torch.bfloat16)
    with pytest.warns(UserWarning, match="additionally merging second"):
        model.merge_adapter(["second"])
    assert model(torch.zeros(1, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_mamba_modules_that_are_never_called(mlp):
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=9, state_size=4))
    with pytest.raises(ValueError, match="'out_proj' is incompatible with Mamba-based models"):
        get_peft_model(model, LormaConfig(target_modules=["out_proj"]))
