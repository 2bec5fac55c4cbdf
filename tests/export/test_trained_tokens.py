"""Adapters with trained tokens, and with embeddings trained as one, in every form they leave in."""

import copy
import json
import warnings

import pytest
import torch
from export_cases import assert_same, filled, loaded, logits
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorma import InputError, LormaConfig, TLoraConfig
from lorma.adapters.folder import DELTA, read_adapter
from lorma.export import Base, export_gguf, export_lora, export_lora_state_dict
from lorma.export.compose import compose
from lorma.export.merge import merge

TOKENS = [3, 7, 40]
KEY = f"base_model.model.model.embed_tokens.{DELTA}"
OPTIONS = {
    "tokens": {"trainable_token_indices": TOKENS},
    "tokens-of-both": {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": TOKENS}},
    "tokens-apart": {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": [1, 2]}},
    "tokens-of-the-head": {"trainable_token_indices": {"lm_head": TOKENS}},
    "whole": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request, bases, tmp_path):
    """Folder, model and batch, with tied or untied embeddings."""
    folder, model, batch = bases["llama"]
    if request.param:
        return folder, model, batch
    model = copy.deepcopy(model)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 0.1 * torch.randn_like(model.lm_head.weight))
    model.save_pretrained(tmp_path / "untied")
    return tmp_path / "untied", AutoModelForCausalLM.from_pretrained(tmp_path / "untied").eval(), batch


def saved(base, config, folder, seed=1):
    adapted = filled(base[1], config, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(folder)
    return adapted


def base_of(base):
    return Base(str(base[0]), auto_model="AutoModelForCausalLM")


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("method", [LormaConfig, TLoraConfig])
def test_as_plain_lora_and_merged(method, case, base, tmp_path):
    _, model, batch = base
    options = copy.deepcopy(OPTIONS[case])
    adapted = saved(base, method(r=2, target_modules=["q_proj", "down_proj"], **options), tmp_path / "adapter")
    expected = logits(adapted, batch)

    export_lora(tmp_path / "adapter", tmp_path / "lora", base=base_of(base))
    assert_same(logits(loaded(model, tmp_path / "lora"), batch), expected, logits(model, batch))
    config, state = export_lora_state_dict(adapted)
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert state.keys() == stored.keys()
    assert type(config) is LoraConfig
    assert config.trainable_token_indices == options.get("trainable_token_indices")
    if case == "tokens":
        assert stored[KEY].equal(load_file(tmp_path / "adapter" / "adapter_model.safetensors")[KEY])

    done = merge(tmp_path / "adapter", tmp_path / "merged", base_of(base))
    assert done.difference is not None
    again, report = type(model).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report.values()), report
    assert_same(logits(again.eval(), batch), expected, logits(model, batch))
    apart = case in ("tokens-apart", "tokens-of-the-head")
    assert again.config.tie_word_embeddings is (model.config.tie_word_embeddings and not apart)


def test_merged_rows_are_those_of_peft(base, tmp_path):
    """LoRA of PEFT as the control: the same rows, merged, give the same embedding to the bit."""
    control = filled(base[1], LoraConfig(target_modules=["q_proj"], trainable_token_indices=TOKENS))
    ours = filled(base[1], LormaConfig(target_modules=["q_proj"], trainable_token_indices=TOKENS))
    rows = [next(p for n, p in m.named_parameters() if "tokens_delta" in n) for m in (control, ours)]
    rows[1].data.copy_(rows[0])
    ours.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", base_of(base))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    whole = control.merge_and_unload()
    assert merged.get_input_embeddings().weight.equal(whole.get_input_embeddings().weight)
    assert merged.get_output_embeddings().weight.equal(whole.get_output_embeddings().weight)


@pytest.mark.parametrize("case", ["tokens", "whole"])
def test_llama_cpp_is_refused(case, base, tmp_path):
    pytest.importorskip("gguf")
    saved(base, LormaConfig(r=2, target_modules=["q_proj"], **copy.deepcopy(OPTIONS[case])), tmp_path / "adapter")
    wanted = (
        "trainable_token_indices, rows of lm_head.weight|rows of model.embed" if case == "tokens" else "trained modules"
    )
    with pytest.raises(InputError, match=wanted):
        export_gguf(tmp_path / "adapter", tmp_path / "a.gguf", base=base_of(base))


def test_rows_that_do_not_fit_are_refused(base, tmp_path):
    from safetensors.torch import save_file

    saved(base, LormaConfig(r=2, target_modules=["q_proj"], trainable_token_indices=TOKENS), tmp_path / "adapter")
    weights, settings = (tmp_path / "adapter" / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    state, content = load_file(weights), json.loads(settings.read_text())
    save_file({**state, KEY: state[KEY][:, :8].contiguous()}, weights)
    with pytest.raises(InputError, match=r"should have shape \[3, 32\]; the file holds \[3, 8\]"):
        merge(tmp_path / "adapter", tmp_path / "merged", base_of(base))
    save_file(state, weights)
    settings.write_text(json.dumps({**content, "trainable_token_indices": [3, 7, 64]}))
    with pytest.raises(InputError, match="trainable_token_indices holds 64; allowed for model.embed_tokens: 0 to 63"):
        export_lora(tmp_path / "adapter", tmp_path / "lora", base=base_of(base))


def test_products(base, tmp_path):
    _, model, batch = base

    def made(name, seed=1, **options):
        return saved(base, LormaConfig(r=2, target_modules=["q_proj", "v_proj"], **options), tmp_path / name, seed)

    made("plain")
    made("tokens", 2, trainable_token_indices=TOKENS)
    made("other", 3, trainable_token_indices=[1, 2])
    saved(base, LormaConfig(r=2, target_modules=["embed_tokens"]), tmp_path / "embedding")
    saved(base, LormaConfig(r=2, target_modules=["lm_head"]), tmp_path / "head")
    rows = read_adapter(tmp_path / "tokens").read(KEY)
    for first, second in (("plain", "tokens"), ("tokens", "plain"), ("tokens", "tokens")):
        compose(tmp_path / first, tmp_path / second, tmp_path / "out", base=base_of(base))
        done = read_adapter(tmp_path / "out")
        assert done.config.trainable_token_indices == TOKENS
        assert done.read(KEY).equal(rows)
        assert not logits(loaded(model, tmp_path / "out"), batch).equal(logits(model, batch))
    with pytest.raises(InputError, match="both adapters have trained tokens.*--heads-from"):
        compose(tmp_path / "tokens", tmp_path / "other", tmp_path / "out")
    for heads_from, number in (("first", 3), ("second", 2)):
        compose(tmp_path / "tokens", tmp_path / "other", tmp_path / "out", heads_from=heads_from)
        done = read_adapter(tmp_path / "out")
        assert len(done.config.trainable_token_indices) == len(done.read(KEY)) == number
    with pytest.raises(InputError, match="adapts model.embed_tokens, of which .* has trained tokens"):
        compose(tmp_path / "embedding", tmp_path / "tokens", tmp_path / "out")
    if model.config.tie_word_embeddings:
        with pytest.raises(InputError, match="lm_head, which is tied to the embedding"):
            compose(tmp_path / "head", tmp_path / "tokens", tmp_path / "out", base=base_of(base))


@pytest.mark.parametrize("method", [LormaConfig, TLoraConfig])
def test_one_adapter_on_tied_embeddings(method, base, tmp_path):
    _, model, batch = base
    if not model.config.tie_word_embeddings:
        pytest.skip("nothing is tied")
    config = method(r=4, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    expected = logits(saved(base, config, tmp_path / "adapter"), batch)
    export_lora(tmp_path / "adapter", tmp_path / "lora", base=base_of(base))
    exported = loaded(model, tmp_path / "lora")
    assert_same(logits(exported, batch), expected, logits(model, batch))
    assert exported.peft_config["default"].ensure_weight_tying
    merge(tmp_path / "adapter", tmp_path / "merged", base_of(base))
    again, report = type(model).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report.values()), report
    assert again.config.tie_word_embeddings
    assert_same(logits(again.eval(), batch), expected, logits(model, batch))
    if method is LormaConfig:
        with pytest.raises(InputError, match="whether .* is tied to an embedding; name the base model"):
            compose(tmp_path / "adapter", tmp_path / "adapter", tmp_path / "out")
        compose(tmp_path / "adapter", tmp_path / "adapter", tmp_path / "out", base=base_of(base))
        both = loaded(model, tmp_path / "adapter")
        both.load_adapter(tmp_path / "adapter", "second")
        both.base_model.set_adapter(["default", "second"])
        assert_same(logits(loaded(model, tmp_path / "out"), batch), logits(both, batch), logits(model, batch))
