"""A tiny Llama with a tokenizer of bytes, and adapters on it that look trained."""

import copy

import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from support.hosts import CONFIGS


@pytest.fixture(scope="session")
def tokenizer():
    vocabulary = {"<pad>": 0, "<eos>": 1}
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary.setdefault(byte, len(vocabulary))
    bytes_only = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_only, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="session")
def base(tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes, **ends))


@pytest.fixture
def trained(base):
    """``trained(method)``: the model with an adapter that is away from its start."""

    def make(method):
        model = get_peft_model(copy.deepcopy(base), copy.deepcopy(CONFIGS[method]))
        generator = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        for name, buffer in model.named_buffers():
            if ".tlora_A." in name and method == "tlora_whole":  # as from a file of another version
                buffer += 0.1 * torch.randn(buffer.shape, generator=generator)
        return model

    return make
