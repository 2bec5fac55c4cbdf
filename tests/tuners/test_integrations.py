"""The host libraries drive the tuner themselves: transformers' adapter calls, its Trainer, and TRL."""

import copy
import functools

import pytest
import torch
from datasets import Dataset
from helpers import is_factor
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from lorma import LormaConfig, TLoraConfig
from lorma.functional import INFLATIONS

CONFIGS = {inflation: functools.partial(LormaConfig, inflation=inflation) for inflation in INFLATIONS}
CONFIGS["tlora"] = TLoraConfig
BOTH = pytest.mark.parametrize("name", ["plus", "tlora"])


def arguments(tmp_path):
    return {
        "output_dir": str(tmp_path),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "learning_rate": 0.01,
        "dataloader_pin_memory": False,
    }


def factors(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if is_factor(name)}


@pytest.mark.parametrize("name", CONFIGS)
def test_trainer(bert, name, tmp_path):
    model = get_peft_model(bert, CONFIGS[name](task_type="SEQ_CLS"))
    before = factors(model)
    rows = [{"input_ids": [1, 2, 3, 4], "attention_mask": [1] * 4, "labels": i % 2} for i in range(4)]
    Trainer(model=model, args=TrainingArguments(**arguments(tmp_path)), train_dataset=Dataset.from_list(rows)).train()
    assert any(not torch.equal(p, before[name]) for name, p in factors(model).items())


@BOTH
def test_transformers_add_adapter(gpt2, name, tmp_path):
    base = copy.deepcopy(gpt2)
    gpt2.add_adapter(CONFIGS[name](target_modules=["c_attn"], init_weights=False), adapter_name="mine")
    x = torch.arange(8)[None]
    expected = gpt2.eval()(x).logits
    assert not torch.allclose(expected, base(x).logits, atol=1e-5)
    gpt2.disable_adapters()
    assert torch.equal(gpt2(x).logits, base(x).logits)
    gpt2.enable_adapters()
    gpt2.train()
    loss = gpt2(x, labels=x).loss
    loss.backward()
    trained = [name for name, p in gpt2.named_parameters() if p.grad is not None]
    assert trained
    assert all(is_factor(name) for name in trained)
    gpt2.save_pretrained(tmp_path)
    again = copy.deepcopy(base)
    again.load_adapter(str(tmp_path))
    assert torch.equal(again.eval()(x).logits, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@BOTH
def test_trl_sft_trainer(gpt2, name, tmp_path):
    trl = pytest.importorskip("trl")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", "two", "and", "make", "four"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    data = Dataset.from_list([{"text": "two and two make four"}] * 4)
    args = trl.SFTConfig(**arguments(tmp_path), max_length=16)
    trainer = trl.SFTTrainer(
        model=gpt2,
        args=args,
        train_dataset=data,
        processing_class=fast,
        peft_config=CONFIGS[name](target_modules=["c_attn"]),
    )
    before = factors(trainer.model)
    trainer.train()
    assert isinstance(trainer.model, PeftModel)
    assert before
    assert any(not torch.equal(p, before[name]) for name, p in factors(trainer.model).items())
