"""DeepSpeed ZeRO-3 on two CPU processes: a partitioned base, adapters trained, saved, and reloaded in one process.

Not part of the test suite: DeepSpeed compiles its communication on first use. ``make zero3`` installs it and runs this:

    python tests/environments/zero3.py            # all variants
    python -m torch.distributed.run --nproc_per_node 2 tests/environments/zero3.py --train DIR VARIANT
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from lorma import LormaConfig, TLoraConfig

STEPS = 5
TINY = {"vocab_size": 96}
ARCHITECTURES = {
    "llama": LlamaConfig(
        **TINY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        attention_bias=True,
    ),
    "gpt2": GPT2Config(**TINY, n_embd=64, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
}
ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
VARIANTS = {
    "plus": ("llama", ATTENTION),
    "plus-post": ("llama", {**ATTENTION, "side": "post"}),
    "permutation": ("llama", {**ATTENTION, "inflation": "permutation"}),
    "dorma": ("llama", {**ATTENTION, "use_dora": True}),
    "tlora": ("llama", ATTENTION),
    "fused": (
        "gpt2",
        {"target_modules": ["c_attn"], "fused_projections": {"c_attn": {"splits": [64, 64, 64], "adapt": [0, 2]}}},
    ),
}
ZERO3 = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_force_ds_cpu_optimizer": False,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def batch():
    return torch.randint(0, 96, (4, 16), generator=torch.Generator().manual_seed(1))


def adapted(folder, name):
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    torch.manual_seed(1)
    config = TLoraConfig if name == "tlora" else LormaConfig
    return get_peft_model(model, config(r=4, task_type="CAUSAL_LM", **VARIANTS[name][1]))


def train_alone(folder, name):
    """The same training in one process without DeepSpeed, on the batches of both ranks."""
    model = adapted(folder, name).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=batch(), labels=batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train_partitioned(folder, name):
    """Runs in each of two processes."""
    import deepspeed
    import torch.distributed as dist
    from transformers.integrations import HfDeepSpeedConfig

    deepspeed.init_distributed(dist_backend="gloo")
    rank = dist.get_rank()
    alive = HfDeepSpeedConfig(ZERO3)
    model = adapted(folder, name)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert alive is not None
    assert all(p.numel() == 0 for p in frozen), "the base is not partitioned"
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=ZERO3, optimizer=optimizer)
    losses = []
    for _ in range(STEPS):
        ids = batch()[2 * rank : 2 * rank + 2]
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / 2)
    engine.eval()
    with torch.no_grad():
        logits = engine(input_ids=batch()).logits
    with deepspeed.zero.GatheredParameters(trained):
        if rank == 0:
            model.save_pretrained(folder / "adapter")
            save_file({"losses": torch.tensor(losses, dtype=torch.float64), "logits": logits}, folder / "result")
    dist.barrier()


def main():
    for name, (architecture, _) in VARIANTS.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(ARCHITECTURES[architecture]).save_pretrained(folder / "base")
            launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", __file__, "--train"]
            subprocess.run([*launch, str(folder), name], check=True, capture_output=True)
            result = load_file(folder / "result")
            losses = result["losses"].tolist()
            base = AutoModelForCausalLM.from_pretrained(folder / "base")
            with torch.no_grad():
                logits = PeftModel.from_pretrained(base, folder / "adapter").eval()(input_ids=batch()).logits
            loss_error = max(abs(a - b) for a, b in zip(losses, train_alone(folder, name), strict=True))
            logit_error = (logits - result["logits"]).abs().max().item()
            falls = f"{losses[0]:.4f} -> {losses[-1]:.4f}"
            print(f"{name}: loss {falls}, to one process {loss_error:.1e}, reloaded {logit_error:.1e}", flush=True)
            assert losses[-1] < losses[0]
            assert loss_error < 1e-5
            assert logit_error < 1e-5


if __name__ == "__main__":
    if "--train" in sys.argv:
        train_partitioned(Path(sys.argv[2]), sys.argv[3])
    else:
        main()
