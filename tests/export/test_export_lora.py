"""Exported LoRA folders give what the adapters give, and need nothing of this library."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from export_cases import EXACT, assert_same, filled, loaded, logits
from peft import get_peft_model, set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import nn

from lorma import InputError, LormaConfig
from lorma.adapters.folder import WEIGHTS_NAME
from lorma.deltas.forms import LoraForm
from lorma.export import Base, Truncation, export_lora, export_lora_state_dict
from lorma.export.lora import _as_peft
from lorma.export.merge import merge
from lorma.files import META_FILE, check_output
from lorma.methods.bottleneck.tuner import BottleneckConfig

TINY = LormaConfig(r=2, task_type="SEQ_CLS", target_modules=["query"])
ALONE = """
import sys
sys.modules["lorma"] = None
import copy, json, torch, transformers
from peft import PeftModel
answers, bases = [], {}
for base, auto, adapter, inputs, kwargs in json.loads(sys.argv[1]):
    if base not in bases:
        bases[base] = getattr(transformers, auto).from_pretrained(base, **kwargs)
    model = PeftModel.from_pretrained(copy.deepcopy(bases[base]), adapter).eval()
    with torch.no_grad():
        answers.append(model(input_ids=torch.tensor(inputs)).logits.tolist())
print(json.dumps(answers))
"""


def change_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def base_for(name, folder):
    auto = {"bert": "AutoModelForSequenceClassification", "vit": "AutoModelForImageClassification"}
    return Base(str(folder), auto_model=auto.get(name, "AutoModelForCausalLM"))


@pytest.mark.parametrize("uniform", [False, True], ids=["ranks", "uniform"])
@pytest.mark.parametrize("case", EXACT)
def test_the_exported_folder_equals_the_adapter(case, uniform, exported_case, tmp_path):
    name, config = EXACT[case]
    folder, model, batch, adapted, adapter = exported_case(name, config())
    change_json(adapter / "adapter_config.json", base_model_name_or_path="organisation/model")
    reports = export_lora(adapter, tmp_path / "lora", base=base_for(name, folder), uniform_rank=uniform)
    assert all(report.error is None for report in reports)
    again = loaded(model, tmp_path / "lora")
    assert_same(logits(again, batch), logits(adapted, batch), logits(model, batch))
    stated = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    source = json.loads((adapter / "adapter_config.json").read_text())
    assert stated["peft_type"] == "LORA"
    for field in ("base_model_name_or_path", "revision", "task_type"):
        assert stated[field] == source[field]
    assert not (uniform and stated["rank_pattern"])


@pytest.mark.parametrize("case", EXACT)
def test_a_live_model_exports_the_same(case, exported_case, tmp_path):
    name, config = EXACT[case]
    folder, _, _, adapted, adapter = exported_case(name, config())
    export_lora(adapter, tmp_path / "lora", base=base_for(name, folder))
    stated, state = export_lora_state_dict(adapted)
    stored = load_file(tmp_path / "lora" / WEIGHTS_NAME)
    assert state.keys() == stored.keys()
    for key, tensor in state.items():
        torch.testing.assert_close(tensor, stored[key], rtol=1e-5, atol=1e-6)
    written = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (stated.r, stated.rank_pattern, stated.fan_in_fan_out, stated.bias) == tuple(
        written[key] for key in ("r", "rank_pattern", "fan_in_fan_out", "bias")
    )


def test_a_live_models_copies_stay_as_they_are_while_training_goes_on(bases):
    adapted = filled(bases["bert"][1], LormaConfig(side="post", target_modules=["query"], bias="lorma_only"))
    _, state = export_lora_state_dict(adapted)
    before = {key: tensor.clone() for key, tensor in state.items()}
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(state[key], before[key]) for key in state)


def test_a_merged_layer_exports_from_the_weight_it_had(bases):
    adapted = filled(bases["bert"][1], TINY)
    _, before = export_lora_state_dict(adapted)
    adapted.merge_adapter()
    _, after = export_lora_state_dict(adapted)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_folders_load_in_a_process_without_lorma(exported_case, bases, tmp_path):
    auto = {"bert": "AutoModelForSequenceClassification"}
    asked, expected = [], []
    for case in ("auto", "ranks", "fused-pre", "tlora"):
        name, config = EXACT[case]
        folder, _, batch, adapted, adapter = exported_case(name, config())
        export_lora(adapter, tmp_path / case, base=base_for(name, folder))
        kwargs = {"num_labels": 2} if name == "bert" else {}
        asked.append(
            [
                str(folder),
                auto.get(name, "AutoModelForCausalLM"),
                str(tmp_path / case),
                batch["input_ids"].tolist(),
                kwargs,
            ]
        )
        expected.append((logits(adapted, batch), logits(bases[name][1], batch)))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ALONE, json.dumps(asked)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for answer, (wanted, base) in zip(json.loads(done.stdout.splitlines()[-1]), expected, strict=True):
        assert_same(torch.tensor(answer), wanted, base)


@pytest.mark.parametrize("inflation", ["permutation", "none"])
def test_what_is_no_lora_is_refused_or_truncated(inflation, exported_case, tmp_path):
    config = LormaConfig(r=2, inflation=inflation, task_type="SEQ_CLS", target_modules=["query"])
    folder, model, batch, adapted, adapter = exported_case("bert", config)
    base = base_for("bert", folder)
    with pytest.raises(InputError, match=r"layer\.0\.attention\.self\.query cannot be .*full rank.*--truncate-rank"):
        export_lora(adapter, tmp_path / "lora", base=base)
    assert not (tmp_path / "lora").exists()
    errors = {}
    for rank in (2, 16, 32):
        reports = export_lora(adapter, tmp_path / "lora", base=base, truncation=Truncation(rank), overwrite=True)
        errors[rank] = reports[0].error
        assert {report.rank for report in reports} == {rank}
        stored = json.loads((tmp_path / "lora" / "export.json").read_text())
        assert [layer["error"] for layer in stored["layers"]] == [report.error for report in reports]
    assert 1 > errors[2] > errors[16] > errors[32]
    assert errors[32] < 1e-5
    assert_same(logits(loaded(model, tmp_path / "lora"), batch), logits(adapted, batch), logits(model, batch))
    for report in export_lora(adapter, tmp_path / "most", base=base, truncation=Truncation(energy=0.9)):
        assert report.error**2 <= 0.1
        assert 1 < report.rank < 32


def test_dora_is_no_lora(exported_case, tmp_path):
    config = LormaConfig(use_dora=True, task_type="SEQ_CLS", target_modules=["query"])
    folder, model, batch, adapted, adapter = exported_case("bert", config)
    with pytest.raises(InputError, match="use_dora"):
        export_lora(adapter, tmp_path / "lora", base=base_for("bert", folder))
    export_lora(adapter, tmp_path / "lora", base=base_for("bert", folder), truncation=Truncation(energy=1.0))
    assert_same(logits(loaded(model, tmp_path / "lora"), batch), logits(adapted, batch), logits(model, batch))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype, exported_case, tmp_path):
    folder, _, _, _, adapter = exported_case("bert", TINY)
    export_lora(adapter, tmp_path / "lora", base=base_for("bert", folder), dtype=dtype)
    kinds = {key: str(t.dtype) for key, t in load_file(tmp_path / "lora" / WEIGHTS_NAME).items() if "lora_" in key}
    assert set(kinds.values()) == {f"torch.{dtype}"}
    with pytest.raises(InputError, match="dtype='float8' must be float32, float16, bfloat16"):
        export_lora(adapter, tmp_path / "other", base=base_for("bert", folder), dtype="float8")


def test_numbers_that_do_not_fit_are_refused(exported_case, bases, tmp_path):
    folder, _, _, adapted, adapter = exported_case("bert", TINY)
    with torch.no_grad():
        adapted.base_model.model.bert.encoder.layer[0].attention.self.query.lorma_B["default"].fill_(1e6)
    adapted.save_pretrained(adapter)
    with pytest.raises(InputError, match="query cannot be exported in float16: it would not be finite"):
        export_lora(adapter, tmp_path / "lora", base=base_for("bert", folder), dtype="float16")


def test_an_output_that_exists_is_left_alone(exported_case, tmp_path):
    folder, _, _, _, adapter = exported_case("bert", TINY)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "mine").write_text("kept")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="holds other files than those of an adapter \\('mine'\\)"):
            export_lora(adapter, tmp_path / "lora", base=base_for("bert", folder), overwrite=overwrite)
    assert [path.name for path in (tmp_path / "lora").iterdir()] == ["mine"]
    with pytest.raises(InputError, match="directory does not exist"):
        export_lora(adapter, tmp_path / "nowhere" / "lora", base=base_for("bert", folder))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LormaConfig(target_parameters=["dense.weight"], target_modules=[]), "bare parameter"),
    ],
    ids=["parameter"],
)
def test_layers_that_peft_has_no_lora_for(config, reason, exported_case, tmp_path):
    folder, _, _, _, adapter = exported_case("bert", config)
    with pytest.raises(InputError, match=rf"dense cannot be exported as a LoRA: .*{reason}"):
        export_lora(adapter, tmp_path / "lora", base=base_for("bert", folder))


def test_a_model_with_an_adapter_of_its_own(bases):
    _, model, batch = bases["llama"]
    adapted = copy.deepcopy(model)
    adapted.add_adapter(LormaConfig(r=2, target_modules=["v_proj"], init_weights=False))
    stated, state = export_lora_state_dict(adapted.eval())
    lora = get_peft_model(copy.deepcopy(model), stated)
    set_peft_model_state_dict(lora, state)
    assert_same(logits(lora.eval(), batch), logits(adapted, batch), logits(model, batch))


def test_what_is_not_linear_has_no_way_out(bases):
    adapted = copy.deepcopy(bases["llama"][1])
    adapted.add_adapter(BottleneckConfig(target_modules=["v_proj"]))
    with pytest.raises(InputError, match="it cannot be merged or exported$"):
        export_lora_state_dict(adapted)


def test_several_adapters_composed_are_one_lora(bases):
    _, model, batch = bases["llama"]
    adapted = filled(model, LormaConfig(r=2, target_modules=["v_proj"]))
    adapted.add_adapter("second", LormaConfig(r=3, target_modules=["v_proj"], init_weights=False))
    adapted.base_model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "both")
    adapted.set_adapter("both")
    stated, state = export_lora_state_dict(adapted, "both")
    assert stated.r == 5
    lora = get_peft_model(copy.deepcopy(model), stated)
    set_peft_model_state_dict(lora, state)
    assert_same(logits(lora.eval(), batch), logits(adapted, batch), logits(model, batch))
    with pytest.raises(InputError, match="no such adapter"):
        export_lora_state_dict(adapted, "third")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_copies_of_base_weights_that_peft_saves_are_not_taken_for_trained_ones(target, bases, tmp_path):
    """PEFT writes the base weight of an adapted head or embedding into the adapter's file."""
    folder, model, batch = bases["llama"]
    adapted = filled(model, LormaConfig(task_type="CAUSAL_LM", target_modules=[target], side="post"))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert any(name.endswith(".base_layer.weight") for name in load_file(tmp_path / "adapter" / WEIGHTS_NAME))
    expected, base = logits(adapted, batch), logits(model, batch)
    merge(tmp_path / "adapter", tmp_path / "merged", base_for("llama", folder))
    assert_same(logits(type(model).from_pretrained(tmp_path / "merged").eval(), batch), expected, base)


def test_a_copy_of_another_base_weight_is_refused(bases, tmp_path):
    folder, model, _ = bases["llama"]
    other = copy.deepcopy(model)
    other.lm_head.weight.data.mul_(2)
    adapted = filled(other, LormaConfig(target_modules=["lm_head"]))
    adapted.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(InputError, match="holds a base weight .* of its own, and it is not the base model's"):
        export_lora(tmp_path, tmp_path / "lora", base=base_for("llama", folder))


def test_names_that_end_alike_keep_their_ranks():
    ranks = {"fc": 2, "block.fc": 4}
    forms = [LoraForm(path, nn.Linear(8, 8), torch.zeros(r, 8), torch.zeros(8, r)) for path, r in ranks.items()]
    config, _ = _as_peft(LormaConfig(), forms, set(ranks), {}, False)
    for pattern in (config.rank_pattern, config.alpha_pattern):
        assert {path: pattern[get_pattern_key(list(pattern), path)] for path in ranks} == ranks


def test_the_output_may_not_be_an_input(bases, tmp_path):
    folder, model, _ = bases["llama"]
    adapter = tmp_path / "run" / "adapter"
    filled(model, LormaConfig(target_modules=["q_proj"])).save_pretrained(adapter)
    for output in (folder, folder.parent, adapter, tmp_path / "run"):
        with pytest.raises(InputError, match="which is read; choose another output"):
            export_lora(adapter, output, base=base_for("llama", folder), overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file; name a folder"):
        export_lora(adapter, tmp_path / "file", base=base_for("llama", folder), overwrite=True)
    assert (adapter / WEIGHTS_NAME).is_file()
    assert (folder / "config.json").is_file()


def test_the_description_of_the_task_is_not_read_through_a_link(exported_case, tmp_path):
    folder, _, _, _, adapter = exported_case("bert", TINY)
    base = base_for("bert", folder)
    (tmp_path / "secret").write_text(json.dumps({"key": "secret"}))
    (adapter / META_FILE).symlink_to(tmp_path / "secret")
    for write in (
        lambda output: export_lora(adapter, output, base=base),
        lambda output: merge(adapter, output, base, verify=False),
    ):
        with pytest.raises(InputError, match=f"{META_FILE} is a link that leads out of the folder"):
            write(tmp_path / "out")
        assert not (tmp_path / "out").exists()
    (adapter / META_FILE).unlink()
    (adapter / META_FILE).write_text(json.dumps({"task": "ö"}))
    export_lora(adapter, tmp_path / "lora", base=base)
    merge(adapter, tmp_path / "merged", base, verify=False)
    for output in ("lora", "merged"):
        assert (tmp_path / output / META_FILE).read_bytes() == (adapter / META_FILE).read_bytes()


def test_what_needs_no_truncation_is_reported_as_exact(exported_case, tmp_path):
    for name, inflation, exact in (("plus", "plus", True), ("none", "none", False)):
        config = LormaConfig(r=2, inflation=inflation, task_type="SEQ_CLS", target_modules=["query"])
        folder, _, _, _, adapter = exported_case("bert", config)
        export_lora(adapter, tmp_path / name, base=base_for("bert", folder), truncation=Truncation(4))
        assert json.loads((tmp_path / name / "export.json").read_text())["exact"] is exact


def test_a_directory_that_may_not_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(InputError, match="out'.*: its directory cannot be written"):
        check_output(tmp_path / "out", False, kind=None)
