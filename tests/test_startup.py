"""What starting costs: commands that need no model import no torch, and lorma waits for PEFT without importing it."""

import re
import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "datasets", "pandas", "pyarrow", "numpy", "sklearn", "scipy"}


def imported(*arguments):
    """Names of the modules that a fresh Python imports."""
    done = subprocess.run([sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True)
    found = set(re.findall(r"^import time: .*\| +(\S+)$", done.stderr, re.MULTILINE))
    assert "lorma" in found
    return found


@pytest.mark.parametrize(
    "command",
    [
        ["--help"],
        ["train", "--help"],
        ["methods"],
        ["train", "missing.yaml"],
        ["train", "quickstart", "train.epoch=2"],
        ["compare", "quickstart", "--methods", "lorma"],
    ],
    ids=" ".join,
)
def test_commands_without_a_model_import_no_torch(command):
    assert not imported("-m", "lorma", *command) & HEAVY


@pytest.mark.parametrize("module", ["lorma", "lorma.tasks", "lorma.runs.recipe", "lorma.analysis", "lorma.cli"])
def test_light_modules(module):
    assert not imported("-c", f"import {module}") & HEAVY


@pytest.mark.parametrize(
    "first",
    [
        "import lorma, peft",
        "import peft, lorma",
        "import lorma; from transformers import Trainer; from peft import PeftModel",
        "import importlib.util, lorma; assert importlib.util.find_spec('peft'); import peft",
    ],
)
def test_peft_knows_our_methods_in_whatever_order_they_are_imported(first):
    code = "import peft; print([peft.PeftType(n).value for n in ('LORMA', 'TLORA')], peft.get_peft_config.__module__)"
    done = subprocess.run([sys.executable, "-c", f"{first}\n{code}"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['LORMA', 'TLORA'] peft.mapping"


def test_names_of_the_package():
    import lorma
    from lorma.methods.lorma.tuner import LormaConfig

    assert lorma.LormaConfig is LormaConfig
    assert set(lorma.__all__) <= set(dir(lorma))
    assert all(getattr(lorma, name) for name in lorma.__all__)
    with pytest.raises(AttributeError, match="module 'lorma' has no attribute 'LormaConfg'"):
        _ = lorma.LormaConfg
