"""Tiny models, and what each process of test_distributed runs."""

import os
import traceback
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import is_factor, randomise
from peft import get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from lorma import LormaConfig, TLoraConfig

VOCABULARY = 40
WIDTH = 32
COMMON = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
"""Wide random weights, so that what an adapter does reaches the outputs; wider ones make Llama amplify rounding."""


class Channels(nn.Module):
    """An embedding, convolutions with and without groups, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 64)
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.grouped = nn.Conv2d(6, 4, 3, stride=2, groups=2)
        self.head = nn.Linear(4, 3)

    def forward(self, input_ids):
        image = self.embed(input_ids).unflatten(-1, (4, 4, 4)).flatten(0, 1)
        return self.head(self.grouped(torch.tanh(self.conv(image))).amax((-1, -2))).unflatten(0, input_ids.shape)


def _bert(layers):
    shape = {"hidden_size": WIDTH, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 48}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**COMMON | {"initializer_range": 0.2}, **shape, **no_dropout))


def _decoder(layers, model, config, **more):
    shape = {"hidden_size": WIDTH, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 48}
    return model(config(num_key_value_heads=2, **COMMON, **shape, **more))


def _gpt2(layers):
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    shape = {"n_embd": WIDTH, "n_layer": layers, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**COMMON, **shape, **no_dropout))


MODELS = {
    "bert": _bert,
    "llama": lambda layers: _decoder(layers, LlamaForCausalLM, LlamaConfig),
    "mixtral": lambda layers: _decoder(layers, MixtralForCausalLM, MixtralConfig, num_local_experts=3),
    "gpt2": _gpt2,
    "channels": lambda layers: Channels(),
}
TARGETS = {
    "bert": {"target_modules": ["query", "value"]},
    "llama": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "mixtral": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "gpt2": {
        "target_modules": ["c_attn"],
        "fused_projections": {"c_attn": {"splits": [WIDTH] * 3, "adapt": [0, 2]}},
    },
    "channels": {"target_modules": ["embed", "conv", "grouped", "head"]},
}
MODES = {
    "plus-pre": {"inflation": "plus", "side": "pre"},
    "plus-post": {"inflation": "plus", "side": "post"},
    "permutation-pre": {"inflation": "permutation", "side": "pre"},
    "permutation-post": {"inflation": "permutation", "side": "post"},
    "dora-pre": {"inflation": "plus", "side": "pre", "use_dora": True},
    "dora-post": {"inflation": "plus", "side": "post", "use_dora": True},
}
"""LoRMA: inflation and side, and DoRMA; by name, so that tests can be read."""
EVERY = [*MODES, "tlora"]


def build(name, layers=1):
    """A base model with random weights, the same at each call."""
    torch.manual_seed(0)
    return MODELS[name](layers).eval()


def config(name, mode, dropout=0.0, **changes):
    if mode == "tlora":  # which takes a fused projection whole, like any linear layer
        targets = {key: value for key, value in TARGETS[name].items() if key != "fused_projections"}
        return TLoraConfig(**{"r": 2, "tlora_dropout": dropout, **targets, **changes})
    options = {"r": 2, "lorma_alpha": 3, "lorma_dropout": dropout}
    return LormaConfig(**{**options, **TARGETS[name], **MODES[mode], **changes})


def adapted(name, mode, base=None, std=0.1, seed=1, low_memory=False, autocast=True, **changes):
    """A model with an adapter of random factors; the base is built unless there is one."""
    model = get_peft_model(
        build(name) if base is None else base,
        config(name, mode, **changes),
        autocast_adapter_dtype=autocast,
        low_cpu_mem_usage=low_memory,
    )
    randomise(model, std=std, seed=seed)
    return model.eval()


def tokens(rows=2, length=8, seed=2):
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def outputs(model, ids=None):
    """The logits of a model, whatever it returns them in."""
    result = model(input_ids=tokens() if ids is None else ids)
    return result if isinstance(result, torch.Tensor) else result.logits


def gradients(model):
    """Gradients of all factors and magnitudes, by name."""
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


# Training, alone or as one of several processes


def loss_of(model, ids):
    """Cross-entropy against targets that follow from the tokens; the mean over rows of one length."""
    logits = outputs(model, ids)
    targets = ids % logits.shape[-1] if logits.ndim == 3 else ids[:, 0] % logits.shape[-1]
    return nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten())


def train(model, ids, average=float, steps=5):
    """Losses of a few steps on one batch; ``average`` takes the mean of a loss over all processes."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.5)
    losses = []
    for _ in range(steps):
        loss = loss_of(model, ids)
        losses.append(average(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def factors(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if is_factor(name)}


class Rank:
    """One of several processes: the methods are what it can be asked to do, all processes at a time."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size
        self.ids = tokens(rows=4)[rank::size]

    def average(self, loss):
        dist.all_reduce(loss, op=dist.ReduceOp.SUM)
        return float(loss) / self.size

    def ddp(self, name, mode):
        model = adapted(name, mode, base=build(name, layers=2))
        wrapped = DistributedDataParallel(model)
        losses = train(wrapped, self.ids, self.average)
        return losses, factors(model), [key for key in wrapped.named_module_buffers if is_factor(key)]

    def fsdp(self, name, mode, folder=None, dtype=torch.float32, finest=False, checkpointing=False, **changes):
        """Train a sharded model; save the adapter as PEFT does and the trained part as a distributed checkpoint."""
        model = shard(adapted(name, mode, base=build(name, layers=2).to(dtype), **changes), finest)
        if checkpointing:
            model.train().get_base_model().activation_checkpointing_enable()
        sharded = {key: tuple(p.to_local().shape) for key, p in model.named_parameters() if isinstance(p, DTensor)}
        full = {key: tuple(p.shape) for key, p in model.named_parameters()}
        losses = train(model, self.ids, self.average)
        if folder is not None:
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            state = get_model_state_dict(model, options=options)
            if self.rank == 0:
                model.save_pretrained(folder / "adapter", state_dict=state)
            dcp.save({"model": trained_part(model)}, checkpoint_id=folder / "checkpoint")
        with torch.no_grad():
            return losses, sharded, full, outputs(model, tokens(rows=4))

    def resume(self, name, mode, folder):
        """Load a checkpoint, whoever wrote it, into a sharded model."""
        model = shard(adapted(name, mode, base=build(name, layers=2), seed=9))
        load_checkpoint(model, folder)
        with torch.no_grad():
            return outputs(model, tokens(rows=4))

    def adapt_sharded(self, name, mode):
        """An adapter for a base model that is sharded already."""
        model = adapted(name, mode, base=shard(build(name, layers=2)))
        with torch.no_grad():
            return outputs(model)

    def merge_sharded(self, name, mode):
        """Try to merge into a sharded model: the error, and whether the outputs are still the same."""
        model = shard(adapted(name, mode, base=build(name, layers=2)))
        with torch.no_grad():
            before = outputs(model)
            try:
                model.merge_adapter()
            except Exception as error:
                return type(error).__name__, torch.equal(outputs(model), before)
            return None, torch.allclose(outputs(model), before, atol=1e-5)

    def mixed_training_dtypes(self):
        """Train biases in bfloat16 beside factors in float32: what FSDP2 says to that."""
        model = shard(adapted("bert", "plus-pre", base=build("bert", layers=2).bfloat16(), bias="all"))
        try:
            train(model, self.ids, self.average)
        except AssertionError as error:
            return str(error)
        return None


def shard(model, finest=False):
    """FSDP2: every transformer layer is a group of its own, the rest another; ``finest``: every linear layer too."""
    if finest:
        for module in model.modules():
            if type(module) is nn.Linear:
                fully_shard(module)
    for layer in blocks(model):
        fully_shard(layer)
    return fully_shard(model)


def blocks(model):
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.bert.encoder.layer if hasattr(inner, "bert") else inner.model.layers


def trained_part(model):
    return get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))


def load_checkpoint(model, folder, **options):
    state = trained_part(model)
    dcp.load({"model": state}, checkpoint_id=folder, **options)
    set_model_state_dict(model, state, options=StateDictOptions(strict=False))


def serve(rank, size, meeting_point, requests, answers):
    """What a process runs: do what is asked for until there is nothing more; answer with the result or the error."""
    warnings.simplefilter("error")
    # PEFT reads an attribute that transformers 5 has renamed, as in pyproject.toml.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    # FSDP2 says so of every linear layer with inputs of three dimensions; nothing here works in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=meeting_point, rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    while (request := requests.get()) is not None:
        method, arguments = request
        try:
            answers.put((rank, getattr(Rank(rank, size), method)(**arguments), None))
        except Exception:
            answers.put((rank, None, traceback.format_exc()))
    dist.destroy_process_group()
