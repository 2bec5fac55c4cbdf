"""What a configuration accepts, and how it refuses the rest."""

import copy
import json
import math
import subprocess
import sys

import pytest
from peft import PeftConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType

import lorma
from lorma import LormaConfig, LormaModel, TLoraConfig
from lorma.tuners.registration import extend_peft_type, register


def test_defaults_are_the_contact_points():
    config = LormaConfig()
    assert (config.r, config.lorma_alpha, config.lorma_dropout) == (8, 8, 0.0)
    assert (config.inflation, config.side, config.bias) == ("plus", "pre", "none")
    assert config.init_weights is True
    for name in ("use_rslora", "use_dora", "fan_in_fan_out"):
        assert getattr(config, name) is False
    for name in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters", "fused_projections"):
        assert getattr(config, name) is None


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("r", 0, ValueError, "r=0 must be an int of at least 1"),
        ("r", -3, ValueError, "r=-3 must be an int"),
        ("r", 2.5, TypeError, "r=2.5 must be an int of at least 1, not float"),
        ("r", "8", TypeError, "r='8' must be an int of at least 1, not str"),
        ("r", True, TypeError, "r=True must be an int"),
        ("lorma_alpha", math.inf, ValueError, "lorma_alpha=inf must be a finite number above 0"),
        ("lorma_alpha", 1e39, ValueError, r"lorma_alpha=1e\+39 must be a finite number above 0 in float32"),
        ("lorma_alpha", 1e-39, ValueError, "lorma_alpha=1e-39 must be a finite number above 0 in float32"),
        ("r", 10**40, ValueError, "must be an int of at least 1 and at most 268,435,456"),
        ("lorma_alpha", math.nan, ValueError, "lorma_alpha=nan must be a finite number above 0"),
        ("lorma_alpha", 0, ValueError, "lorma_alpha=0 must be a finite number above 0"),
        ("lorma_alpha", "8", TypeError, "lorma_alpha='8' must be a finite number"),
        ("lorma_dropout", 1.0, ValueError, r"lorma_dropout=1.0 must lie in \[0, 1\)"),
        ("lorma_dropout", -0.1, ValueError, r"lorma_dropout=-0.1 must lie in \[0, 1\)"),
        ("lorma_dropout", math.nan, ValueError, r"lorma_dropout=nan must lie in \[0, 1\)"),
        ("lorma_dropout", "0", TypeError, "lorma_dropout='0' must be a number"),
        ("inflation", "pluss", ValueError, "inflation='pluss' is not allowed.*did you mean 'plus'"),
        ("inflation", None, TypeError, "inflation=None must be one of plus, permutation, none"),
        ("side", "left", ValueError, "side='left' is not allowed; choose one of pre, post, auto"),
        ("bias", "lora_only", ValueError, "bias='lora_only' is not allowed.*'lorma_only'"),
        ("use_rslora", "yes", TypeError, "use_rslora='yes' must be true or false"),
        ("init_weights", 1, TypeError, "init_weights=1 must be true or false"),
        ("target_modules", 3, TypeError, "target_modules=3 must be a string or a list of strings"),
        ("target_modules", ["q", 3], TypeError, "target_modules must be .*; it holds 3"),
        ("target_modules", "(", ValueError, r"target_modules='\(' is not a regular expression: missing \)"),
        ("exclude_modules", "*", ValueError, r"exclude_modules='\*' is not a regular expression"),
        ("modules_to_save", "head", TypeError, "modules_to_save='head' must be a list of strings"),
        ("layers_to_transform", "1", TypeError, "layers_to_transform='1' must be a layer index"),
        ("rank_pattern", {"q": 0}, ValueError, r"rank_pattern\['q'\]=0 must be an int of at least 1"),
        ("rank_pattern", [1], TypeError, r"rank_pattern=\[1\] must be a dict"),
        ("rank_pattern", {1: 1}, TypeError, "rank_pattern has the key 1"),
        ("alpha_pattern", {"q": math.inf}, ValueError, r"alpha_pattern\['q'\]=inf must be a finite number"),
        ("use_dora", 1, TypeError, "use_dora=1 must be true or false"),
        ("undo", "copy", ValueError, "undo='copy' is not allowed; choose one of snapshot, inverse, refuse"),
        ("target_parameters", "experts.w", TypeError, "target_parameters='experts.w' must be a list of strings"),
        ("fused_projections", ["c_attn"], TypeError, "must be a dict from module names to how they are cut"),
        ("fused_projections", {"c_attn": {}}, TypeError, r"fused_projections\['c_attn'\]={} must be a dict like"),
        ("fused_projections", {"c_attn": {"split": [1, 2]}}, TypeError, "must be a dict like"),
        ("fused_projections", {"c_attn": {"splits": [8]}}, ValueError, "must be a list of two or more widths"),
        ("fused_projections", {"c_attn": {"splits": [8, 0]}}, ValueError, "must be a list of two or more widths"),
        ("fused_projections", {"c_attn": {"splits": [8, 8], "adapt": [2]}}, ValueError, "slice indices from 0 to 1"),
        ("fused_projections", {"c_attn": {"splits": [8, 8], "adapt": []}}, ValueError, "slice indices from 0 to 1"),
    ],
)
def test_bad_values_are_named(argument, value, error, message):
    with pytest.raises(error, match=message):
        LormaConfig(**{argument: value})


def test_layer_selection_needs_names():
    with pytest.raises(ValueError, match="`layers_to_transform` cannot be used when `target_modules` is a str"):
        LormaConfig(target_modules="query", layers_to_transform=[1])
    with pytest.raises(ValueError, match="When `layers_pattern` is specified"):
        LormaConfig(target_modules=["query"], layers_pattern="layer")


def test_round_trip_through_json(tmp_path):
    config = LormaConfig(r=4, inflation="permutation", side="auto", target_modules=["q", "v"], rank_pattern={"q": 2})
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORMA"
    assert PeftConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_a_wrong_type_in_adapter_config_json_is_named(tmp_path):
    LormaConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": "eight"}))
    with pytest.raises(TypeError, match="r='eight' must be an int of at least 1"):
        PeftConfig.from_pretrained(tmp_path)


def test_peft_knows_the_method():
    assert PeftType("LORMA") is PeftType.LORMA
    assert PeftType.LORMA in list(PeftType)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORMA] is LormaConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["LORMA"] is LormaModel
    assert extend_peft_type("LORMA") is PeftType.LORMA
    register("lorma", LormaConfig, LormaModel)
    with pytest.raises(RuntimeError, match="'lora' is taken by"):
        register("lora", LormaConfig, LormaModel)


IMPORT_COST = """
import time
start = time.process_time()
import peft
between = time.process_time()
import lorma, sys
end = time.process_time()
heavy = [name for name in ("triton", "matplotlib", "ray", "datasets", "typer", "pandas") if name in sys.modules]
before = set(heavy) & set(sys.argv[1].split(","))
print((end - between) / (between - start), ",".join(heavy))
"""


def test_import_adds_little_to_peft():
    alone = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, peft; print(','.join(n for n in ('triton', 'datasets') if n in sys.modules))",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    out = subprocess.run(
        [sys.executable, "-c", IMPORT_COST, alone], capture_output=True, text=True, check=True
    ).stdout.split()
    assert float(out[0]) < 0.1
    assert ("" if len(out) == 1 else out[1]) == alone


def test_version():
    assert lorma.__version__.count(".") == 2


def test_a_scaling_that_the_weights_cannot_hold(mlp):
    config = LormaConfig(r=1, lorma_alpha=1e5, target_modules=["up"])
    get_peft_model(copy.deepcopy(mlp), config)
    message = (
        r"the scaling of up, 1e\+05 \(alpha over the rank\), must lie from 6.1e-05 to 6.55e\+04, what float16 holds"
    )
    with pytest.raises(ValueError, match=message):
        get_peft_model(copy.deepcopy(mlp).half(), config, autocast_adapter_dtype=False)
    with pytest.raises(ValueError, match="the scaling of up, 1.5e-39"):
        get_peft_model(mlp, LormaConfig(r=8, lorma_alpha=1.2e-38, target_modules=["gate", "up"]))


@pytest.mark.parametrize(
    ("config", "name", "answer"),
    [
        (LormaConfig, "lora_alpha", "; did you mean 'lorma_alpha'?"),
        (LormaConfig, "lora_dropout", "; did you mean 'lorma_dropout'?"),
        (LormaConfig, "init_lora_weights", "; did you mean 'init_weights'?"),
        (LormaConfig, "lora_bias", "; did you mean 'bias'?"),
        (LormaConfig, "target_module", "; did you mean 'target_modules'?"),
        (LormaConfig, "loftq_config", ": lorma has nothing like this field of LoRA"),
        (TLoraConfig, "lora_dropout", "; did you mean 'tlora_dropout'?"),
        (TLoraConfig, "lora_alpha", ": tlora has nothing like this field of LoRA"),
        (TLoraConfig, "use_dora", ": tlora has nothing like this field of LoRA"),
    ],
)
def test_a_field_of_lora_is_answered_with_the_name_it_has_here(config, name, answer):
    with pytest.raises(TypeError) as caught:
        config(**{name: 16})
    assert str(caught.value) == f"{config.__name__} got an unexpected keyword argument {name!r}{answer}"


def test_a_file_of_a_later_version_is_read_without_what_is_new():
    with pytest.warns(UserWarning, match="Unexpected keyword arguments"):
        config = LormaConfig.from_peft_type(peft_type="LORMA", task_type=None, r=3, invented_later=True)
    assert config.r == 3
