"""Adapter folders from strangers: refused in one line, before anything is opened, imported or allocated."""

import json
import os
import re
import time

import pytest
import torch
from helpers import adapted
from safetensors.torch import load_file, save_file

from lorma import InputError, LormaConfig
from lorma.adapters.folder import read_adapter
from lorma.adapters.regex_cost import check_cost
from lorma.errors import one_line

LAYERS = "|".join(re.escape(f"model.layers.{i}.self_attn.q_proj") for i in range(400))


@pytest.fixture
def folder(mlp, tmp_path):
    adapted(mlp, r=2, rank_pattern={"conv": 3}).save_pretrained(tmp_path / "a")
    return tmp_path / "a"


def change(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_good_folder(folder):
    adapter = read_adapter(folder)
    assert (adapter.method, adapter.config.r) == ("LORMA", 2)
    assert adapter.modules("lorma_A") == [f"base_model.model.{name}" for name in ("conv", "gate", "up")]
    name = "base_model.model.conv.lorma_A"
    assert adapter.tensors[name] == ((3, 6), torch.float32)
    assert torch.equal(adapter.read(name), load_file(folder / "adapter_model.safetensors")[name])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 3}, "but adapter_config.json states rank 3 for it"),
        ({"r": 10**8}, "states a rank of 100000000; the widest weight"),
        ({"r": 10**9}, "r=1000000000 must be an int of at least 1 and at most 268,435,456"),
        ({"rank_pattern": {"conv": 3, "head": 10**8}}, "states a rank of 100000000"),
        ({"rank_pattern": {"(a+)+": 3}}, "can take very long to match"),
        ({"target_modules": ".*" * 9}, "can take very long to match"),
        ({"target_modules": "(" * 20000}, "is not a regular expression"),
        ({"layers_pattern": ["(a+)+"], "layers_to_transform": [0], "target_modules": ["up"]}, "can take very long"),
        ({"rank_pattern": {f"a{i}": 2 for i in range(2000)}}, "rank_pattern has 2,000 entries"),
        ({"target_modules": ["x" * 2_000_000]}, "is larger than"),
        ({"r": True}, "r=True must be an int"),
        ({"lorma_alpha": 10**400}, "must be a finite number in float32"),
        (
            {"lorma_alpha": 1e39},
            "lorma_alpha=1e+39 must be a finite number in float32: at most 3.4e+38",
        ),
        ({"lorma_alpha": 1e-300}, "lorma_alpha=1e-300 must be a finite number above 0 in float32"),
        ({"alpha_pattern": {"up": 10**39}}, "must be a finite number in float32"),
        ({"lorma_dropout": -1e300}, "must be a finite number in float32"),
        ({"peft_type": "LORNA"}, "peft_type='LORNA' is no method of PEFT or lorma; did you mean"),
        ({"peft_type": ["LORMA"]}, "peft_type=['LORMA'] is no method"),
        ({"peft_type": "PROMPT_TUNING", "tokenizer_name_or_path": "/"}, "'PROMPT_TUNING' is not read here"),
        ({"peft_type": "XLORA"}, "'XLORA' is not read here"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron_config must be null"),
        ({"base_model_name_or_path": ["/etc"]}, "must be a string or null"),
        ({"base_model_name_or_path": "a\x00b"}, "must be a string or null"),
    ],
)
def test_hostile_configurations(folder, fields, message):
    change(folder, **fields)
    start = time.monotonic()
    with pytest.raises(InputError) as refused:
        read_adapter(folder)
    assert message in str(refused.value)
    assert str(refused.value) == one_line(refused.value)
    assert time.monotonic() - start < 5
    if fields.get("peft_type") is None and "megatron_config" not in fields:
        with pytest.raises((ValueError, TypeError)):
            LormaConfig.from_pretrained(str(folder))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"r": NaN}', "NaN is no JSON number"),
        ('{"r": 1e999}', "1e999 is too large a number"),
        ('{"r": ' + "9" * 5000 + "}", "cannot be read"),
        ("[1]", "must hold a JSON object"),
        ("", "cannot be read"),
        ("\xff\xfe", "cannot be read"),
    ],
)
def test_hostile_json(folder, text, message):
    (folder / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=message):
        read_adapter(folder)


def test_auto_mapping_is_forgotten(folder):
    change(folder, auto_mapping={"parent_library": "antigravity", "base_model_class": "x"})
    assert read_adapter(folder).config.auto_mapping is None


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_links_and_pipes(folder, name, tmp_path):
    os.replace(folder / name, tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(InputError, match="is a link that leads out of the folder"):
        read_adapter(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(InputError, match="is not an ordinary file"):
        read_adapter(folder)
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"has no {name}"):
        read_adapter(folder)


def test_the_hubs_cache_may_link_to_its_blobs(folder, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    for place in (snapshot, blobs):
        place.mkdir(parents=True)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        os.replace(folder / file, blobs / f"blob-{file}")
        (snapshot / file).symlink_to(blobs / f"blob-{file}")
    assert read_adapter(snapshot).config.r == 2


def test_pickles_are_not_read(folder):
    os.replace(folder / "adapter_model.safetensors", folder / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model.bin is not read, only safetensors"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2, 6, dtype=torch.int64), "a factor holds floating-point numbers"),
        (torch.zeros(2, 6, dtype=torch.float8_e4m3fn), "allowed: F64"),
        (torch.zeros(0, 6), "a factor holds floating-point numbers"),
        (torch.zeros(2), "states rank"),
        (torch.zeros(6, 5000), r"shape \[6, 5000\]; a rank of 5000 may be at most its other dimension, 6, or 4096"),
    ],
)
def test_hostile_weights(folder, tensor, message):
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.up.lorma_B": tensor}, path)
    with pytest.raises(InputError, match=message):
        read_adapter(folder)


@pytest.mark.parametrize("length", [0, 7, 10**9, 2**63])
def test_a_header_that_lies_about_its_length(folder, length):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(InputError, match="is truncated or not a safetensors file"):
        read_adapter(folder)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q_proj|v_proj)",
        r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj",
        ".*(self_attn|mlp).*(q_proj|k_proj).*",
        r"^(?!.*(?:lm_head|embed)).*\.(?:query|value)$",
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn).*?(?:q_proj|k_proj|v_proj).*?)",
        r"layers\.([0-9]|1[0-5])\.mlp",
        "(a|b|c)*",
        ".*q_proj",
        "(q|k|v)_proj",
        r"layers\.\d+\.(self_attn|mlp)\..*",
        r"^model\.layers\.(1[0-9]|2[0-3])\..*(q|v)_proj$",
        r"(.*\.)?(query|value)$",
        r"(^|.*\.)classifier($|\..*)",
        r"(?:language_model\.)?model\.layers\.\d+\.(?:self_attn|mlp)\.(?:q|k|v|o|gate|up|down)_proj",
        r"(?i).*\.(Q_proj|V_proj)",
        r"(?i:x(?-i:(?:ab|cd)*))",
        LAYERS,
        f"(?i){LAYERS}",
        "",
    ],
)
def test_patterns_that_people_write(pattern):
    start = time.monotonic()
    check_cost("target_modules", pattern)
    assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    "pattern",
    [
        *("(a+)+$", "(.*)*", "(a|a)*b", "(a?)" * 30, "(a|a)" * 30, ".*" * 8, r"(\w+\.)*x", "((a{1,9}){1,9}){1,9}"),
        *("(?i)(?:ab|AB)*c", "(?i:(?:ab|AB)*c)", "(?:(?i:ab|AB))*c", "(?i:x(?-i:y(?i:ab|AB)*))"),
        "(?:abcdefghij|abcdefghi.|abcdefgh.j|abcdefg.ij)*x",
        f"(?:{'a' * 41})?" * 30,
    ],
)
def test_patterns_that_backtrack(pattern):
    with pytest.raises(ValueError, match="can take very long to match"):
        LormaConfig(target_modules=pattern)


@pytest.mark.parametrize(
    ("pattern", "unit"),
    [("(?i:(?:ab|AB)*c)", "ab"), ("(?:abcdefghij|abcdefghi.|abcdefgh.j|abcdefg.ij)*x", "abcdefghij")],
)
def test_patterns_that_backtrack_on_long_names_in_a_file(pattern, unit, folder):
    weights, name = folder / "adapter_model.safetensors", "base_model.model." + (unit * 100)[:200]
    save_file({f"{name}.lorma_A": torch.zeros(2, 6), f"{name}.lorma_B": torch.zeros(6, 2)}, weights)
    change(folder, rank_pattern={pattern: 2})
    start = time.monotonic()
    with pytest.raises(InputError, match="can take very long to match"):
        read_adapter(folder)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_costly_patterns_are_refused_before_they_are_matched(field, folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: {"((.*)*)*Z": 2}}))
    with pytest.raises(InputError, match="can take very long to match"):
        read_adapter(folder)


def test_patterns_that_are_costly_on_long_names_are_refused(folder):
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    name = "base_model.model." + "a" * 200
    save_file(
        load_file(weights) | {f"{name}.lorma_A": torch.zeros(2, 6), f"{name}.lorma_B": torch.zeros(6, 2)}, weights
    )
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rank_pattern": {".*.*.*.*Z": 2}}))
    start = time.monotonic()
    with pytest.raises(InputError, match="rank_pattern can take very long to match"):
        read_adapter(folder)
    assert time.monotonic() - start < 2
