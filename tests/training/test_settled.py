"""What training settles on a base model, on every way back: padding, positions, heads, ends, generation settings."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    OPTConfig,
    RobertaConfig,
)

from lorma.errors import InputError
from lorma.models.load import load_model, load_tokenizer
from lorma.models.positions import position_limit
from lorma.models.settled import read_settled
from lorma.schema import ModelSpec
from lorma.tasks.stopping import stop_token_ids, turn_end
from lorma.training.inference import load_predictor

SHORT, LONG = "the film was great", "the plot of the film was very dull and so slow"


def edit(path, **changes):
    """Change keys of a JSON file; None takes a key out."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.fixture
def bare_llama(tiny_llama, tmp_path):
    """A decoder whose tokenizer and configuration have no padding token."""
    folder = tmp_path / "bare-llama"
    shutil.copytree(tiny_llama, folder)
    edit(folder / "tokenizer_config.json", pad_token=None)
    edit(folder / "config.json", pad_token_id=None)
    edit(folder / "generation_config.json", pad_token_id=None)
    return folder


@pytest.fixture
def short_gpt2(tiny_llama, tmp_path):
    """A GPT-2 of 16 positions, with a tokenizer that states no limit."""
    folder = tmp_path / "short-gpt2"
    shutil.copytree(tiny_llama, folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=80, n_embd=32, n_layer=1, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=1, pad_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    edit(folder / "tokenizer_config.json", model_max_length=None)
    return folder


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"{LONG} {LONG} {i}"}) + "\n" for i in range(1, 9)))
    return path


def ok(result):
    assert result.code == 0, result.err
    return result


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_a_decoder_without_padding_token_on_every_way_back(task, bare_llama, recipe_file, tmp_path, cli):
    table = tmp_path / "rows.csv"
    table.write_text("text,label\n" + "".join(f"the film was {i},{i % 2}\n" for i in range(1, 10)))
    data = {"train": str(table), "max_length": 16}
    trained = ok(cli("train", recipe_file(task=task, model={"name": str(bare_llama)}, data=data)))
    run, merged = tmp_path / "run", tmp_path / "merged"
    both = ("--text", SHORT, "--text", LONG)
    answers = ok(cli("predict", run, *both)).out
    ok(cli("evaluate", run))
    ok(cli("merge", run, "-o", merged))
    assert ok(cli("predict", merged, *both)).out == answers
    lines = [line.strip() for line in trained.out.splitlines() if line.startswith("    ")]
    scope: dict = {}
    exec("\n".join(lines), scope)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    batch = tokenizer([SHORT, LONG], padding=True, return_tensors="pt")
    plain = AutoModelForSequenceClassification.from_pretrained(merged).eval()
    with torch.no_grad():
        expected = load_predictor(run).model(**batch).logits
        assert torch.allclose(plain(**batch).logits, expected, atol=1e-5)
        assert torch.allclose(scope["model"].eval()(**batch).logits, expected, atol=1e-5)
    assert "pad_token_id=1" in (run / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_a_base_with_a_head_of_another_size(task, tiny_bert, recipe_file, tmp_path, cli):
    base = tmp_path / "three"
    shutil.copytree(tiny_bert, base)
    config = BertConfig.from_pretrained(tiny_bert, num_labels=3)
    BertForSequenceClassification(config).save_pretrained(base)
    table = tmp_path / "rows.csv"
    table.write_text("text,label\n" + "".join(f"the film was {i},{i % 2}\n" for i in range(1, 10)))
    data = {"train": str(table), "max_length": 16}
    trained = ok(cli("train", recipe_file(task=task, model={"name": str(base)}, data=data)))
    needed = 2 if task == "classification" else 1
    assert f"is for 3 labels (classifier.weight), this task needs {needed}: a new head is made" in trained.out
    run, merged = tmp_path / "run", tmp_path / "merged"
    answers = ok(cli("predict", run, "--text", SHORT)).out
    ok(cli("evaluate", run))
    ok(cli("merge", run, "-o", merged))
    ok(cli("export", run, "-o", tmp_path / "lora"))
    assert ok(cli("predict", merged, "--text", SHORT)).out == answers
    assert ok(cli("predict", tmp_path / "lora", "--text", SHORT)).out == answers
    scope: dict = {}
    exec("\n".join(line.strip() for line in trained.out.splitlines() if line.startswith("    ")), scope)
    assert scope["model"].config.num_labels == needed


def test_other_weights_of_another_size_are_refused(tiny_bert, tmp_path):
    base = tmp_path / "odd"
    shutil.copytree(tiny_bert, base)
    edit(base / "config.json", vocab_size=99)
    with pytest.raises(InputError, match=r"word_embeddings\.weight is \(.*\) in its weights and \(99, 32\)"):
        load_model(ModelSpec(name=str(base)), "AutoModelForSequenceClassification", num_labels=2)


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (BertConfig(max_position_embeddings=64, num_hidden_layers=1), 64),
        (GPT2Config(n_positions=64, n_layer=1), 64),
        (RobertaConfig(max_position_embeddings=66, num_hidden_layers=1), 64),
        (OPTConfig(max_position_embeddings=64, num_hidden_layers=1), 64),
        (LlamaConfig(max_position_embeddings=64), 64),
        (LlamaConfig(max_position_embeddings=64, rope_parameters={"rope_type": "linear", "factor": 2.0}), 128),
        (DebertaV2Config(position_biased_input=False), None),
    ],
)
def test_positions_of_a_configuration(config, limit):
    assert position_limit(config, 1) == limit


def test_sequences_end_where_positions_do(short_gpt2, texts, recipe_file, tmp_path, cli):
    recipe = recipe_file(task="causal-lm", model={"name": str(short_gpt2)}, data={"train": str(texts)})
    refused = cli("train", recipe, "data.max_length=17")
    assert (refused.code, "data.max_length: 17 exceeds the model's 16 tokens" in refused.err) == (2, True)
    ok(cli("train", recipe))
    run = tmp_path / "run"
    alone = ok(cli("predict", run, "--text", SHORT, "--max-new-tokens", 3))
    assert alone.err == ""
    done = ok(cli("predict", run, "--text", SHORT, "--text", f"{LONG} very dull"))
    assert "note: the model has 16 positions" in done.err
    filled = cli("predict", run, "--text", SHORT, "--text", f"{LONG} {LONG}")
    assert filled.code == 2
    assert "row 2 to predict: its prompt has 22 tokens" in filled.err
    beside = ok(cli("predict", run, "--text", SHORT, "--text", f"{LONG} very dull very", "--max-new-tokens", 3))
    assert beside.out.splitlines()[0] == alone.out.splitlines()[0]


def test_ends_of_an_answer(tiny_llama):
    tokenizer = load_tokenizer(ModelSpec(name=str(tiny_llama)))
    tokenizer.add_tokens(["<turn>"])
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} <turn>\n{% endfor %}"
    assert turn_end(tokenizer) == turn
    assert stop_token_ids(tokenizer, GenerationConfig(eos_token_id=[5, 1])) == [1, 5, turn]
    assert stop_token_ids(tokenizer, None, ["bad", "no such token"]) == [
        1,
        turn,
        tokenizer.convert_tokens_to_ids("bad"),
    ]
    for other in ("{{ raise_exception('no') }}", "{{ messages[0].nothing.at.all }}", None):
        tokenizer.chat_template = other
        assert turn_end(tokenizer) is None


@pytest.mark.parametrize("method", ["lorma-plus", "full"])
def test_predict_stops_on_all_ends(method, tiny_llama, texts, recipe_file, tmp_path, cli):
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    dull, slow = tokenizer.convert_tokens_to_ids(["dull", "slow"])
    edit(base / "generation_config.json", eos_token_id=dull)
    tokenizer.add_special_tokens({"additional_special_tokens": ["slow"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} slow {% endfor %}"
    tokenizer.save_pretrained(base)
    ok(
        cli(
            "train", recipe_file(task="causal-lm", model={"name": str(base)}, data={"train": str(texts)}, method=method)
        )
    )
    run, merged = tmp_path / "run", tmp_path / "merged"
    weights = run / ("model" if method == "full" else "adapter")
    assert read_settled(weights).stop_tokens == ("<eos>", "dull", "slow")
    assert set(load_predictor(run).stops) == {1, dull, slow}
    if method == "full":
        merged = weights
    else:
        ok(cli("merge", run, "-o", merged))
    assert set(GenerationConfig.from_pretrained(merged).eos_token_id) == {1, dull, slow}
    predictor = load_predictor(merged)
    assert set(predictor.stops) == {1, dull, slow}
    row = {"text": SHORT}
    torch.nn.init.zeros_(predictor.model.lm_head.weight)  # every token is as likely, and the first one is taken
    assert len(replace(predictor, stops=(1,))._generate(*_ids(predictor, row), 5)[0]) == 5
    assert replace(predictor, stops=(1, 0))._generate(*_ids(predictor, row), 5) == [[]]


def _ids(predictor, row):
    batch = predictor.task.encode([row], predictor.meta, predictor.tokenizer)
    return batch["input_ids"], batch["attention_mask"]


@pytest.mark.parametrize("method", ["full", "bitfit"])
def test_generation_settings_that_cannot_be_saved(method, short_gpt2, texts, recipe_file, tmp_path, cli):
    edit(short_gpt2 / "generation_config.json", do_sample=False, temperature=0.6, top_p=0.9, length_penalty=2.0)
    recipe = recipe_file(task="causal-lm", model={"name": str(short_gpt2)}, data={"train": str(texts)}, method=method)
    trained = ok(cli("train", recipe))
    assert "cannot be saved, are left out: length_penalty=2.0, temperature=0.6, top_p=0.9" in trained.out
    kept = GenerationConfig.from_pretrained(tmp_path / "run" / "model")
    assert kept.eos_token_id == 1
    assert kept.temperature is None or kept.temperature == 1.0
    ok(cli("predict", tmp_path / "run", "--text", SHORT, "--max-new-tokens", 2))


@pytest.mark.parametrize(
    "settled", [[], {"stop_tokens": [1]}, {"stop_tokens": ["a"] * 65}, {"load": {"device_map": "x"}}, {"pad_token": 3}]
)
def test_a_task_file_that_says_nonsense_of_tokens(settled, tmp_path):
    (tmp_path / "lorma_task.json").write_text(json.dumps({"settled": settled}))
    with pytest.raises(InputError, match="settled does not describe tokens"):
        read_settled(tmp_path)
