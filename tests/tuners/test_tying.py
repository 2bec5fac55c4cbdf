"""Trained tokens and embeddings that are trained as one, with PEFT's LoRA as the control."""

import copy
import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

from lorma import InputError, LormaConfig, TLoraConfig
from lorma.export import Base
from lorma.export.merge import merge
from lorma.methods.bottleneck.tuner import BottleneckConfig
from lorma.methods.svft.tuner import SvftConfig
from lorma.training.inference import load_adapter

METHODS = {"lorma": LormaConfig, "tlora": TLoraConfig, "svft": SvftConfig, "bottleneck": BottleneckConfig}
TARGETS = ["q_proj", "v_proj"]
TOKENS = [1, 5, 9]
DELTA = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
EMBEDDING = "base_model.model.model.embed_tokens.weight"
HEAD = "base_model.model.lm_head.weight"
IDS = torch.tensor([[3, 1, 5, 8, 9], [2, 9, 9, 1, 4]])


def llama(tied):
    torch.manual_seed(0)
    sizes = {"vocab_size": 12, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied)).eval()


def adapt(model, config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ensure_weight_tying on a model that ties nothing
        return get_peft_model(copy.deepcopy(model), config)


def answers(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def train(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return answers(model)


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_alone_train_as_loras_do(tied):
    base = llama(tied)
    found = []
    for config in (LoraConfig, LormaConfig, TLoraConfig):
        model = adapt(base, config(target_modules=TARGETS, trainable_token_indices=TOKENS))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("trainable_tokens" in name)
        assert answers(model).equal(answers(base))
        found.append(train(model))
    assert not found[0].equal(answers(base))
    assert found[1].equal(found[0])
    assert found[2].equal(found[0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"trainable_token_indices": TOKENS},
        {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": TOKENS}, "ensure_weight_tying": True},
        {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    ],
    ids=["tokens", "tokens-of-both", "whole"],
)
def test_trained_saved_loaded_and_merged(method, tied, options, tmp_path):
    base = llama(tied)
    config = METHODS[method](target_modules=TARGETS, **copy.deepcopy(options))
    model = adapt(base, config)
    trained = train(model)
    model.save_pretrained(tmp_path)
    for quick in (False, True):
        loaded = adapt(base, LormaConfig(target_modules=["k_proj"]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=quick)
            assert answers(loaded).equal(trained)
            loaded.load_adapter(tmp_path, "again", low_cpu_mem_usage=quick)
            loaded.set_adapter("again")
            assert answers(loaded).equal(trained)
            assert answers(load_adapter(copy.deepcopy(base), tmp_path)).equal(trained)
    with model.disable_adapter():
        assert answers(model).equal(answers(base))
    if method == "bottleneck":
        return
    model.merge_adapter()
    assert_close(answers(model), trained)
    model.unmerge_adapter()
    assert answers(model).equal(trained)
    whole = model.merge_and_unload()
    assert_close(answers(whole), trained)
    embedding, head = whole.get_input_embeddings(), whole.get_output_embeddings()
    assert (embedding.weight is head.weight) is whole.config.tie_word_embeddings is tied


@pytest.mark.parametrize("method", METHODS)
def test_several_adapters_with_tokens_or_modules_of_their_own(method):
    base = llama(True)
    for first, second in (
        ({"trainable_token_indices": TOKENS}, {"trainable_token_indices": [2, 3]}),
        ({"trainable_token_indices": TOKENS}, {}),
        (
            {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
            {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        ),
    ):
        model = adapt(base, METHODS[method](target_modules=TARGETS, **first))
        trained = train(model)
        model.add_adapter("second", METHODS[method](target_modules=TARGETS, **second))
        assert answers(model).equal(trained)
        model.set_adapter("second")
        other = train(model)
        model.set_adapter("default")
        assert answers(model).equal(trained)
        with torch.no_grad():
            mixed = model(input_ids=IDS, adapter_names=["second", "default"]).logits
        assert_close(mixed, torch.stack([other[0], trained[1]]))
        model.delete_adapter("second")
        assert answers(model).equal(trained)


def test_tied_modules_are_trained_as_one():
    model = adapt(
        llama(True), LormaConfig(target_modules=TARGETS, modules_to_save=["lm_head"], ensure_weight_tying=True)
    )
    train(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.modules_to_save["default"].weight is head.modules_to_save["default"].weight
    assert not embedding.modules_to_save["default"].weight.equal(embedding.original_module.weight)


def test_a_merge_that_fails_takes_tokens_back():
    model = adapt(llama(True), LormaConfig(target_modules=TARGETS, trainable_token_indices=TOKENS))
    train(model)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "tokens_delta" in n)[0, 0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="trainable_tokens|NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert all(value.equal(before[name]) or value.isnan().any() for name, value in model.state_dict().items())
    assert not any(getattr(module, "merged_adapters", ()) for module in model.modules())


@pytest.mark.parametrize("config", [LormaConfig, TLoraConfig])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"trainable_token_indices": 3}, TypeError, "trainable_token_indices=3 must be a list of token numbers"),
        ({"trainable_token_indices": [True]}, TypeError, "it holds True"),
        ({"trainable_token_indices": [-1]}, ValueError, r"token numbers \(ints from 0\); it holds -1"),
        ({"trainable_token_indices": [2, 2]}, ValueError, "each token once; it holds 2 twice"),
        ({"trainable_token_indices": {}}, ValueError, "at least one token"),
        ({"trainable_token_indices": {"wte": 3}}, TypeError, r"trainable_token_indices\['wte'\]=3 must be a list"),
        ({"ensure_weight_tying": "yes"}, TypeError, "ensure_weight_tying='yes' must be true or false"),
    ],
)
def test_values_that_are_not_allowed(config, options, error, message):
    with pytest.raises(error, match=message):
        config(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"trainable_token_indices": [3, 12]},
            "trainable_token_indices holds 12; allowed for model.embed_tokens: 0 to 11",
        ),
        (
            {"trainable_token_indices": {"wte": [1]}},
            "trainable_token_indices names 'wte', which this model does not have",
        ),
        ({"trainable_token_indices": {"norm": [1]}}, "rows are trained of nn.Embedding only"),
        (
            {"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]},
            "trainable_token_indices and modules_to_save both train model.embed_tokens;",
        ),
        (
            {"trainable_token_indices": [1], "target_modules": ["lm_head"]},
            "trainable_token_indices and target_modules both train lm_head, which is tied to the embedding;",
        ),
    ],
)
def test_tokens_that_do_not_fit_the_model(options, message):
    model = llama(True)
    before = [type(module) for module in model.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=message):
            get_peft_model(model, LormaConfig(**{"target_modules": TARGETS, **options}))
    assert [type(module) for module in model.modules()] == before


def test_tied_output_layers_with_a_bias_are_refused():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    bert = BertForMaskedLM(BertConfig(**sizes, vocab_size=12))
    phi = PhiForCausalLM(PhiConfig(**sizes, vocab_size=12, tie_word_embeddings=True))
    for model, options in (
        (bert, {"trainable_token_indices": [1]}),
        (phi, {"trainable_token_indices": [1]}),
        (phi, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    ):
        with pytest.raises(ValueError, match="(decoder|lm_head) is tied to the embedding and has a bias"):
            get_peft_model(copy.deepcopy(model), LormaConfig(target_modules=["query", "q_proj"], **options))


@pytest.mark.parametrize("config", [LoraConfig, LormaConfig])
def test_folders_whose_tokens_do_not_fit_their_weights(config, tmp_path):
    base = llama(True)
    adapt(base, config(target_modules=TARGETS, trainable_token_indices=TOKENS)).save_pretrained(tmp_path)
    weights, settings = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    state, content = load_file(weights), json.loads(settings.read_text())
    assert DELTA in state
    for tokens, tensors, message in (
        ([1, 5], state, r"shape \[3, 16\]; by trainable_token_indices of adapter_config.json it holds 2 rows"),
        ([1, 5, "x"], state, "it holds 'x'"),
        ([1, 5, 99], state, "cannot be used"),
        (TOKENS, {name: value for name, value in state.items() if name != DELTA}, "holds no token_adapter"),
        (TOKENS, {**state, DELTA: torch.zeros(3, 8)}, r"has shape \[3, 8\], the model has room for \[3, 16\]"),
    ):
        save_file(tensors, weights)
        settings.write_text(json.dumps({**content, "trainable_token_indices": tokens}))
        with pytest.raises(InputError, match=message):
            load_adapter(copy.deepcopy(base), tmp_path)
    save_file(state, weights)
    slow = {"modules_to_save": ["(a*)*" * 9 + "b"], "ensure_weight_tying": True, "trainable_token_indices": TOKENS}
    settings.write_text(json.dumps({**content, **slow}))
    with pytest.raises(InputError, match="modules_to_save"):
        load_adapter(copy.deepcopy(base), tmp_path)


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["embed_tokens"], r"(.*\.)?(q_proj|embed_tokens)"])
@pytest.mark.parametrize("method", ["lorma", "tlora"])
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_one_adapter_on_tied_embeddings(method, targets, tmp_path):
    base = llama(True)

    def config():
        return METHODS[method](target_modules=targets, ensure_weight_tying=True, r=4)

    model = adapt(base, config())
    trained = train(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert_close(embedding.get_delta_weight("default"), head.get_delta_weight("default"))
    assert embedding.get_delta_weight("default").abs().max() > 1e-3
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert not any("lm_head" in name for name in names)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    for quick in (False, True):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=quick, is_trainable=True)
        assert answers(loaded).equal(trained)
        train(loaded)
        assert_close(*(layer.get_delta_weight("default") for layer in (embedding, head)))
    assert answers(load_adapter(copy.deepcopy(base), tmp_path)).equal(trained)
    model.add_adapter("second", config())
    model.set_adapter("second")
    train(model)
    assert_close(embedding.get_delta_weight("second"), head.get_delta_weight("second"))
    model.set_adapter("default")
    assert answers(model).equal(trained)
    model.merge_adapter()
    assert embedding.base_layer.weight is head.base_layer.weight
    assert_close(answers(model), trained)
    model.unmerge_adapter()
    assert embedding.base_layer.weight is head.base_layer.weight
    assert answers(model).equal(trained)
    whole = model.merge_and_unload()
    assert_close(answers(whole), trained)
    assert whole.get_input_embeddings().weight is whole.get_output_embeddings().weight
    assert whole.config.tie_word_embeddings


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SvftConfig(target_modules=["lm_head"], ensure_weight_tying=True), "with SVFT ties modules_to_save only"),
        (LormaConfig(target_modules=["lm_head"], ensure_weight_tying=True, use_dora=True), "with use_dora ties"),
        (
            LormaConfig(target_modules=["lm_head"], ensure_weight_tying=True, exclude_modules=["embed_tokens"]),
            "lm_head is tied to the embedding, which is left out of target_modules",
        ),
    ],
)
def test_adapters_that_cannot_be_tied(config, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(llama(True), config)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("method", [LoraConfig, LormaConfig, TLoraConfig])
def test_new_tokens_of_a_resized_vocabulary(method, tmp_path):
    llama(True).save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(14, mean_resizing=False)
    base.save_pretrained(tmp_path / "resized")
    model = adapt(base, method(target_modules=TARGETS, trainable_token_indices=[12, 13], task_type="CAUSAL_LM"))
    trained = train(model)
    model.save_pretrained(tmp_path / "adapter")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "resized")
    assert_close(answers(load_adapter(copy.deepcopy(again), tmp_path / "adapter")), trained)
    assert_close(answers(PeftModel.from_pretrained(again, tmp_path / "adapter")), trained)
    if method is not LoraConfig:
        merge(tmp_path / "adapter", tmp_path / "merged", Base(str(tmp_path / "resized")))
        assert_close(answers(LlamaForCausalLM.from_pretrained(tmp_path / "merged")), trained, rtol=1e-4, atol=1e-5)
