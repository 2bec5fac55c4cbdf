"""Several adapters on one model: partial merges, mixed batches, one adapter out of two; tied embeddings."""

import copy

import numpy as np
import pytest
import torch
from helpers import TARGETS, adapted, randomise
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lorma import LormaConfig, prepare_for_hotswap


def two_adapters(model, **second):
    model = adapted(model)
    model.add_adapter("second", LormaConfig(target_modules=TARGETS, r=3, **second))
    randomise(model, "second", seed=5)
    return model


@pytest.mark.parametrize("side", ["pre", "post"])
def test_after_a_partial_merge_the_others_act_on_top(mlp, side):
    x = torch.randn(3, 6, dtype=torch.float64)
    model = two_adapters(mlp.double(), side=side)
    model.base_model.set_adapter(["default", "second"])
    together = model(x)
    model.merge_adapter(["default"])
    assert_close(model(x), together)
    with pytest.warns(UserWarning, match="You are now additionally merging"):
        model.merge_adapter(["second"])
    assert_close(model(x), together)
    model.unmerge_adapter()
    assert torch.equal(model(x), together)


def test_a_partial_merge_in_another_order_is_refused(mlp):
    x = torch.randn(3, 6)
    model = two_adapters(mlp)
    model.base_model.set_adapter(["default", "second"])
    together = model(x)
    with pytest.raises(ValueError, match="merging second into up would change the order in which adapters act"):
        model.merge_adapter(["second"])
    assert torch.equal(model(x), together)


def test_merging_an_adapter_that_is_not_active_stands_for_it_alone(mlp):
    x = torch.randn(3, 6)
    model = two_adapters(mlp)
    model.set_adapter("second")
    second = model(x)
    model.set_adapter("default")
    model.merge_adapter(["second"])
    assert_close(model(x), second, rtol=1e-4, atol=1e-5)


def test_layers_are_merged_in_one_way_at_a_time(mlp):
    model = two_adapters(mlp)
    model.base_model.set_adapter(["default", "second"])
    model.base_model.merge_adapter(["default"], undo="snapshot")
    layer = model.base_model.model.up
    with (
        pytest.warns(UserWarning, match="additionally merging"),
        pytest.raises(ValueError, match="is already merged with undo='snapshot'"),
    ):
        layer.merge(adapter_names=["second"], undo="inverse")


def test_reports_say_how_a_merge_is_undone(mlp):
    model = adapted(mlp, undo="inverse")
    merged = model.base_model.merge_adapter()
    assert [report.layer for report in merged] == TARGETS
    undone = model.base_model.unmerge_adapter()
    assert all(report.undo == "inverse" and 0 < report.error_bound < 1e-4 for report in undone)
    assert all(1 < report.condition < 1e4 for report in undone)
    model.base_model.merge_adapter(undo="refuse")
    with pytest.raises(ValueError, match="was merged with undo='refuse'; it cannot be unmerged"):
        model.unmerge_adapter()


@pytest.fixture
def tied():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=60,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning")
def test_tied_embeddings_come_apart_when_merged_and_are_tied_again(tied, tmp_path):
    ids = torch.randint(3, 60, (2, 7))
    model = adapted(tied, target_modules=["embed_tokens", "q_proj"])
    expected = model(ids).logits
    inner = model.base_model.model
    model.merge_adapter()
    assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert inner.lm_head.weight is inner.model.embed_tokens.base_layer.weight
    merged = model.merge_and_unload()
    assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path)
    assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_mixed_batch_generates_what_each_adapter_generates(tied):
    model = adapted(tied, target_modules=["q_proj", "v_proj", "up_proj"])
    model.add_adapter(
        "second", LormaConfig(target_modules=["down_proj", "k_proj"], side="post", inflation="permutation")
    )
    randomise(model, "second", seed=5)
    ids = torch.randint(3, 60, (3, 5))
    names = ["second", "__base__", "default"]
    for beams in (1, 2):
        options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        mixed = model.generate(input_ids=ids, adapter_names=names, **options)
        for row, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    alone = model.generate(input_ids=ids[row : row + 1], **options)
            else:
                model.set_adapter(name)
                alone = model.generate(input_ids=ids[row : row + 1], **options)
            assert torch.equal(mixed[row], alone[0])


@torch.no_grad()
def test_a_mixed_batch_of_a_padded_and_an_unpadded_adapter_of_one_rank(mlp):
    model = adapted(mlp, target_modules=["up", "gate"], r=3)
    prepare_for_hotswap(model, target_rank=5)
    model.add_adapter("second", LormaConfig(target_modules=["up", "gate"], r=3))
    randomise(model, "second", seed=5)
    x, names = torch.randn(4, 6), ["second", "default", "default", "second"]
    mixed = model(x, adapter_names=names)
    for row, name, found in zip(x, names, mixed, strict=True):
        model.set_adapter(name)
        assert_close(found, model(row[None])[0], rtol=1e-4, atol=1e-5)


def test_a_mixed_batch_of_an_encoder_decoder_with_beams():
    torch.manual_seed(0)
    config = T5Config(d_model=16, d_ff=24, d_kv=8, num_heads=2, num_layers=1, vocab_size=40, decoder_start_token_id=0)
    model = adapted(T5ForConditionalGeneration(config).eval(), target_modules=["q", "v", "wo"])
    ids = torch.randint(3, 40, (2, 5))
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    mixed = model.generate(input_ids=ids, adapter_names=["__base__", "default"], **options)
    assert torch.equal(mixed[1], model.generate(input_ids=ids[1:], **options)[0])


def test_mixed_batches_are_checked(bert):
    model = adapted(bert, target_modules=["query"])
    ids = torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="non-existing adapter\\(s\\): other"):
        model(ids, adapter_names=["default", "other"])
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same as the number of inputs"):
        model(ids, adapter_names=["default"])
    with pytest.raises(TypeError, match="must be a list of adapter names"):
        model(ids, adapter_names="default")
    model.merge_adapter()
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when there are merged adapters"):
        model(ids, adapter_names=["default", "default"])
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="in training mode"):
        model.train()(ids, adapter_names=["default", "default"])


def test_composing_with_weights_and_different_ranks(mlp):
    x = torch.randn(3, 6, dtype=torch.float64)
    model = two_adapters(mlp.double(), alpha_pattern={"gate": 3})
    model.base_model.add_weighted_adapter(["default", "second"], [1.0, 0.5], "both")
    layer = model.base_model.model.gate
    assert layer.r["both"] == 11
    layer_scaling = dict.fromkeys(TARGETS, layer.scaling["second"])
    for name in TARGETS:
        held = getattr(model.base_model.model, name)
        layer_scaling[name], held.scaling["second"] = held.scaling["second"], held.scaling["second"] * 0.5
    model.base_model.set_adapter(["default", "second"])
    expected = model(x)
    model.set_adapter("both")
    assert_close(model(x), expected)
    assert not torch.allclose(model(x), mlp(x), atol=1e-3)


def test_a_combination_can_be_saved_and_loaded(mlp, tmp_path):
    x = torch.randn(3, 6)
    model = two_adapters(mlp)
    model.add_adapter("third", LormaConfig(target_modules=["up"], r=2))
    randomise(model, "third", seed=6)
    model.base_model.add_weighted_adapter(["default", "third"], [1.0, 1.0], "both")
    model.set_adapter("both")
    expected = model(x)
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    loaded = PeftModel.from_pretrained(copy.deepcopy(mlp), tmp_path / "both").eval()
    assert torch.equal(loaded(x), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inflation": "permutation"}, "adapter 'second' has inflation='permutation'"),
        ({"use_dora": True}, "adapter 'second' has use_dora=True"),
        ({"side": "post"}, "adapters 'default' and 'second' differ in side"),
    ],
)
def test_what_cannot_be_combined_is_refused(mlp, change, message):
    model = two_adapters(mlp, **change)
    with pytest.raises(ValueError, match=message):
        model.base_model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "both")
    assert "both" not in model.peft_config


def test_wrong_arguments_of_a_combination(mlp):
    combine = two_adapters(mlp).base_model.add_weighted_adapter
    with pytest.raises(ValueError, match="combination_type='svd' is not allowed; choose one of compose, linear"):
        combine(["default", "second"], [1.0, 1.0], "both", "svd")
    with pytest.raises(ValueError, match="Adapter third does not exist"):
        combine(["default", "third"], [1.0, 1.0], "both")
    with pytest.raises(ValueError, match="must be lists of the same length"):
        combine(["default", "second"], [1.0], "both")
    with pytest.raises(ValueError, match=r"combination_type='linear' needs one rank; on up the adapters have \[8, 3\]"):
        combine(["default", "second"], [1.0, 1.0], "both", "linear")


@pytest.mark.parametrize("number", [torch.tensor, np.float32])
def test_weights_of_a_combination_may_be_any_numbers(mlp, number):
    model = two_adapters(mlp)
    model.base_model.add_weighted_adapter(["default", "second"], [1.0, 0.5], "plain")
    model.base_model.add_weighted_adapter(["default", "second"], [number(1.0), number(0.5)], "both")
    for name, factor in model.named_parameters():
        if ".both." in name:
            assert torch.equal(factor, model.get_parameter(name.replace(".both.", ".plain.")))
    with pytest.raises(ValueError, match="must be finite numbers; found"):
        model.base_model.add_weighted_adapter(["default", "second"], [number(1.0), number(float("nan"))], "none")


def test_fused_projections_are_checked_against_the_model(gpt2):
    def fused(name, splits):
        return LormaConfig(target_modules=["c_attn", "c_fc"], fused_projections={name: {"splits": splits}})

    with pytest.raises(ValueError, match="fused_projections names 'c_atn', which this model does not have.*c_attn"):
        get_peft_model(gpt2, fused("c_atn", [32, 32, 32]))
    with pytest.raises(ValueError, match=r"add up to 64, but transformer.h.0.attn.c_attn has 96 outputs"):
        get_peft_model(gpt2, fused("c_attn", [32, 32]))


def test_adapters_on_one_fused_layer_must_cut_it_alike(gpt2):
    def config(splits):
        return LormaConfig(target_modules=["c_attn"], fused_projections={"c_attn": {"splits": splits}})

    model = get_peft_model(gpt2, config([32, 32, 32]))
    with pytest.raises(ValueError, match=r"cuts .*c_attn into \[64, 32\], but adapter 'default' cuts it into"):
        model.add_adapter("second", config([64, 32]))


def test_mixed_models_of_peft_are_refused_by_name():
    model = GPT2ForSequenceClassification(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, pad_token_id=0))
    with pytest.raises(ValueError, match="LORMA"):
        get_peft_model(model, LormaConfig(), mixed=True)
    mixed = get_peft_model(model, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True), mixed=True)
    with pytest.raises((TypeError, ValueError), match="LORMA|LormaConfig"):
        mixed.add_adapter("second", LormaConfig(target_modules=["c_fc"]))


def test_a_slice_cannot_be_multiplied_after_the_whole_on_the_other_side(gpt2):
    ids = torch.randint(0, 60, (2, 5))
    cut = {"c_attn": {"splits": [32, 32, 32], "adapt": [0, 2]}}
    model = adapted(gpt2, target_modules=["c_attn"])
    model.add_adapter("slices", LormaConfig(target_modules=["c_attn"], side="post", fused_projections=cut))
    randomise(model, "slices", seed=5)
    model.base_model.set_adapter(["default", "slices"])
    with pytest.raises(ValueError, match="single slices and cannot act after 'default'"):
        model(ids)
    model.base_model.set_adapter(["slices", "default"])
    merged = copy.deepcopy(model).merge_and_unload()
    assert_close(merged(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


class Nested(nn.Module):
    """Layers whose names end in each other's."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 6)
        self.block = nn.ModuleDict({"up": nn.Linear(6, 6)})

    def forward(self, x):
        return self.block["up"](self.up(x))


def test_ranks_of_layers_whose_names_end_alike(tmp_path):
    x, base = torch.randn(3, 6), Nested()
    model = adapted(base, target_modules=["up"], r=4, rank_pattern={"block.up": 8})
    model.add_adapter("second", LormaConfig(target_modules=["block.up"], r=3))
    randomise(model, "second", std=0.1)
    model.base_model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "both")
    assert (model.base_model.model.up.r["both"], model.base_model.model.block["up"].r["both"]) == (4, 11)
    expected = model(x)
    prepare_for_hotswap(model)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert_close(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()(x), expected)


def test_a_combination_of_adapters_on_different_layers(mlp):
    x = torch.randn(3, 6)
    model = adapted(mlp, exclude_modules=["gate"])
    model.add_adapter("second", LormaConfig(target_modules=["gate", "up"], r=3))
    randomise(model, "second")
    model.base_model.set_adapter(["default", "second"])
    expected = model(x)
    model.base_model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "both")
    model.set_adapter("both")
    assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("undo", ["snapshot", "refuse"])
def test_a_failed_second_merge_leaves_everything_as_it_was(mlp, undo):
    """The second adapter overflows float16 in the last layer, which no check of the factors can foresee."""
    model = two_adapters(mlp.half()).base_model
    model.set_adapter(["default", "second"])
    model.merge_adapter(["default"], undo=undo)
    model.model.conv.lorma_B["second"].data.fill_(1e30)
    before = [
        (layer.base_layer.weight, list(layer.merged_adapters), layer.merge_state.undo) for layer in model._layers()
    ]
    with (
        pytest.warns(UserWarning, match="additionally merging"),
        pytest.raises(ValueError, match="NaNs detected in the merged weights of conv"),
    ):
        model.merge_adapter(["second"], safe_merge=True)
    after = [
        (layer.base_layer.weight, list(layer.merged_adapters), layer.merge_state.undo) for layer in model._layers()
    ]
    assert all(old[0] is new[0] and old[1:] == new[1:] for old, new in zip(before, after, strict=True))


def test_unloading_needs_no_way_back(mlp):
    x = torch.randn(3, 6)
    model = adapted(mlp, use_dora=True, undo="inverse")
    expected = model(x)
    assert_close(model.merge_and_unload()(x), expected, rtol=1e-4, atol=1e-5)


def test_wrong_arguments_of_a_merge(mlp):
    model = adapted(mlp).base_model
    with pytest.raises(ValueError, match="there is no adapter typo"):
        model.merge_adapter(["typo"])
    with pytest.raises(ValueError, match="quantized='round' is not allowed"):
        model.merge_adapter(quantized="round")
    with pytest.raises(ValueError, match="undo='copy' is not allowed"):
        model.merge_adapter(undo="copy")
    model.merge_adapter(["default", "default"])
    assert model.model.up.merged_adapters == ["default"]


def test_unloading_one_of_two_dora_adapters(mlp):
    x = torch.randn(3, 6)
    model = adapted(mlp, use_dora=True)
    model.add_adapter("second", LormaConfig(target_modules=TARGETS, r=3, use_dora=True))
    randomise(model, "second", seed=5)
    model.set_adapter("second")
    second = model(x)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="while the DoRA adapter 'second' of up acts unmerged"):
        model.base_model.merge_adapter(["default"], undo="refuse")
    merged = model.merge_and_unload(adapter_names=["second"])
    assert_close(merged(x), second, rtol=1e-4, atol=1e-5)


def test_a_refused_unloading_changes_no_default():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear8bitLt(16, 8, has_fp16_weights=False).to("cpu")
    model = get_peft_model(nn.Sequential(layer), LormaConfig(target_modules=["0"])).base_model
    with pytest.raises(ValueError, match="say what merging shall do"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="quantized='round' is not allowed"):
        model.merge_and_unload(quantized="round")
    assert model.model[0].undo == {"default": "snapshot"}
    assert model.model[0].quantized_merge is None
    model.merge_adapter(quantized="dequantize")
    assert len(model.unmerge_adapter()) == 1
