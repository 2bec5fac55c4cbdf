"""TRL's trainers on a model that carries a trained adapter: their reference must be a copy of it, and stay one."""

import math

import pytest
import torch
from datasets import Dataset

from support.hosts import CONFIGS

trl = pytest.importorskip("trl")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
PROMPTS = ["2+2=", "3+1=", "5+4=", "1+7="]
ROWS = [{"prompt": p, "chosen": f" {eval(p[:-1])}", "rejected": " no"} for p in PROMPTS]
JUDGED = [
    {"prompt": r["prompt"], "completion": r[k], "label": k == "chosen"} for r in ROWS for k in ("chosen", "rejected")
]
METHODS = [name for name in CONFIGS if name != "tlora_whole"]


def arguments(folder):
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "bf16": False,
        "lr_scheduler_type": "constant",
    }


def adapter(model, name):
    """Parameters and buffers of one adapter."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        key.replace(f".{name}.", "."): t.detach().clone()
        for key, t in tensors.items()
        if f".{name}." in key and "checksum" not in key
    }


def logits(model, name, tokenizer):
    model.set_adapter(name)
    with torch.no_grad():
        return model.eval()(**tokenizer(PROMPTS[0], return_tensors="pt")).logits


def check(trainer, tokenizer):
    """Train; the reference is the adapter from before. Returns what was logged at each step."""
    model = trainer.model
    before = adapter(model, "default")
    assert before
    assert before.keys() == adapter(model, "ref").keys()
    assert torch.equal(logits(model, "default", tokenizer), logits(model, "ref", tokenizer))
    model.set_adapter("default")
    trainer.train()
    reference, after = adapter(model, "ref"), adapter(model, "default")
    assert all(torch.equal(reference[key], before[key]) for key in before)
    assert any(not torch.equal(after[key], before[key]) for key in before)
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("method", CONFIGS)
def test_dpo(trained, tokenizer, tmp_path, method):
    trainer = trl.DPOTrainer(
        model=trained(method),
        args=trl.DPOConfig(**arguments(tmp_path), max_length=32, beta=0.5),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
    )
    first, second = check(trainer, tokenizer)
    assert abs(first["loss"] - math.log(2)) < 1e-5
    assert abs(first["rewards/chosen"]) + abs(first["rewards/rejected"]) < 2e-6
    assert second["loss"] < first["loss"]


@pytest.mark.parametrize("method", METHODS)
def test_kto(trained, tokenizer, tmp_path, method):
    trainer = trl.KTOTrainer(
        model=trained(method),
        args=trl.KTOConfig(**arguments(tmp_path), max_length=32, beta=0.5),
        train_dataset=Dataset.from_list(JUDGED),
        processing_class=tokenizer,
    )
    first, _ = check(trainer, tokenizer)
    assert abs(first["loss"] - 0.5) < 1e-5  # 1 − σ(0), for wanted and unwanted answers alike
    rewards = [first[key] for key in ("rewards/chosen", "rewards/rejected") if key in first]
    assert rewards
    assert all(abs(reward) < 2e-6 for reward in rewards)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_online(trained, tokenizer, tmp_path, method, kind):
    options = {"num_generations": 2, "max_completion_length": 4, "beta": 0.5}
    trainer = getattr(trl, f"{kind}Trainer")(
        model=trained(method),
        args=getattr(trl, f"{kind}Config")(**arguments(tmp_path), **options),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
    )
    first, *_ = check(trainer, tokenizer)
    assert abs(first["kl"]) < 1e-6
