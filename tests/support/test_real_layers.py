"""Layers of real architectures: stacked experts, fused projections, a torchao model loaded by transformers."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.testing import assert_close
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    Qwen3MoeConfig,
    TorchAoConfig,
)

from lorma import LormaConfig
from support import plain
from support.case import INFLATIONS, SIDES, distance, randomise

SMALL = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2}
MODELS = {
    "mixtral": lambda: MixtralConfig(**SMALL, **EXPERTS, num_local_experts=3),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SMALL, **EXPERTS, head_dim=4, moe_intermediate_size=12, num_experts=3),
    "gpt_oss": lambda: GptOssConfig(
        **SMALL, **EXPERTS, head_dim=4, num_local_experts=3, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    ),
    "gpt2": lambda: GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=60, n_positions=32),
    "phi3": lambda: Phi3Config(**SMALL),
}
PARAMETERS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
C_ATTN = {
    "target_modules": ["c_attn"],
    "fused_projections": {"c_attn": {"splits": [16, 16, 16], "adapt": [0, 2]}},
}
PHI3 = {
    "target_modules": ["qkv_proj", "gate_up_proj"],
    "fused_projections": {
        "qkv_proj": {"splits": [16, 8, 8], "adapt": [0, 2]},
        "gate_up_proj": {"splits": [24, 24]},
    },
}
TARGETS = {"mixtral": PARAMETERS, "qwen3_moe": PARAMETERS, "gpt_oss": PARAMETERS, "gpt2": C_ATTN, "phi3": PHI3}


def build(name, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name]()).to(dtype).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # the defaults start experts so small that they do not matter
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def tokens():
    return torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))


def adapted(base, **options):
    return randomise(get_peft_model(copy.deepcopy(base), LormaConfig(r=2, lorma_alpha=3, **options))).eval()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("inflation", INFLATIONS)
@pytest.mark.parametrize("name", MODELS)
def test_a_life(name, inflation, side, tmp_path):
    """Start, training step, merge, unmerge, save, load."""
    base, options = build(name), {**TARGETS[name], "inflation": inflation, "side": side}
    before = base(tokens()).logits
    started = get_peft_model(copy.deepcopy(base), LormaConfig(r=2, **options)).eval()(tokens()).logits
    if inflation == "plus":
        assert torch.equal(started, before)
    elif inflation == "permutation":
        assert_close(started, before, rtol=0, atol=1e-4)
    model = adapted(base, **options)
    expected = model(tokens()).logits
    assert distance(expected, before) > 1e-2
    model(tokens(), labels=tokens()).loss.backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == ("lorma_" in key), key
    weights = {key: parameter.clone() for key, parameter in model.named_parameters()}
    model.merge_adapter()
    assert distance(model(tokens()).logits, expected) < 1e-5
    model.unmerge_adapter()
    assert all(torch.equal(parameter, weights[key]) for key, parameter in model.named_parameters())
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        state = loaded.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert distance(loaded.eval()(tokens()).logits, expected) < 1e-6
    merged = model.merge_and_unload()
    assert distance(merged(tokens()).logits, expected) < 1e-5
    assert set(merged.state_dict()) == set(base.state_dict())


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("inflation", INFLATIONS)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_every_expert_has_its_own_multiplier(name, inflation, side):
    base = build(name)
    model = adapted(base, inflation=inflation, side=side, **PARAMETERS)
    replaced = {}
    for path, layer in model.base_model.model.named_modules():
        if not hasattr(layer, "lorma_A"):
            continue
        experts = layer.get_base_layer()
        W = getattr(experts, layer.parameter_name)
        multiply = plain.stored_in_out(plain.stacked) if name == "gpt_oss" else plain.stacked
        out, in_ = W.shape[:0:-1] if name == "gpt_oss" else W.shape[1:]
        chosen = side if side != "auto" else "pre" if out <= in_ else "post"
        widths = [out if chosen == "pre" else in_] * len(W)
        A, B = layer.lorma_A["default"], layer.lorma_B["default"]
        Ms = plain.multipliers(A, B, 1.5, inflation, widths)
        replaced[path.replace(".base_layer", "") + f".{layer.parameter_name}"] = multiply(W, Ms, chosen)
    assert len(replaced) == 4
    expected = torch.func.functional_call(base, replaced, (tokens(),)).logits
    assert distance(model(tokens()).logits, expected) < 1e-5


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("inflation", INFLATIONS)
def test_only_query_and_value_of_a_fused_attention_change(inflation, side):
    model = adapted(build("gpt2"), inflation=inflation, side=side, **C_ATTN)
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    query, key, value = layer.get_delta_weight("default").split(16, dim=1)
    assert not key.any()
    assert query.any()
    assert value.any()
    before = layer.base_layer.weight.data.clone()
    model.merge_adapter()
    assert torch.equal(layer.base_layer.weight[:, 16:32], before[:, 16:32])
    assert not torch.equal(layer.base_layer.weight[:, :16], before[:, :16])


def test_parameters_of_query_and_value_at_the_size_of_gpt2():
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(GPT2Config())
    fused = {"c_attn": {"splits": [768, 768, 768], "adapt": [0, 2]}}
    for side in SIDES:
        config = LormaConfig(r=8, side=side, target_modules=["c_attn"], fused_projections=fused)
        model = get_peft_model(copy.deepcopy(base), config)
        assert model.get_nb_trainable_parameters()[0] == 12 * 2 * 8 * (768 + 768)


@pytest.mark.parametrize("inflation", INFLATIONS)
def test_slices_of_unequal_widths_are_adapted_like_layers_of_their_own(inflation):
    """Phi-3's qkv_proj: the merged weight is that of three projections, each multiplied by itself."""
    model = adapted(build("phi3", torch.float64), inflation=inflation, **PHI3)
    layer = model.base_model.model.model.layers[0].self_attn.qkv_proj
    A, B = layer.lorma_A["default"], layer.lorma_B["default"]
    assert A.shape == (2, 16 + 8)
    W = layer.base_layer.weight
    Ms = plain.multipliers(A, B, 1.5, inflation, [16, 8])
    expected = plain.fused([16, 8, 8], [0, 2])(W, Ms, "pre")
    assert distance(W + layer.get_delta_weight("default"), expected) < 1e-12


@pytest.mark.parametrize("config", [Int8WeightOnlyConfig(version=2), IntxWeightOnlyConfig(weight_dtype=torch.int4)])
@pytest.mark.parametrize("inflation", INFLATIONS)
def test_torchao_is_requantised_when_transformers_loaded_it(inflation, config, tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**{**SMALL, "hidden_size": 32})).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=TorchAoConfig(config), device_map="cpu")
    model = adapted(base.eval(), inflation=inflation, target_modules=["q_proj", "v_proj"])
    expected = model(tokens()).logits
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    storage, before = type(layer.base_layer.weight), layer.base_layer.weight.dequantize()
    exact = before + layer.get_delta_weight("default")
    reports = model.merge_adapter(quantized="requantize")
    assert len(reports) == 4
    assert type(layer.base_layer.weight) is storage
    error = distance(layer.base_layer.weight.dequantize(), exact)
    assert 0 < error < 0.2
    assert reports[0].requantization_error == pytest.approx(error, rel=1e-2)
    assert distance(model(tokens()).logits, expected) < 0.2
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight.dequantize(), before)
    assert torch.equal(model(tokens()).logits, expected)
