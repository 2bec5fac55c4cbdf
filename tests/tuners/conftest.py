"""Small models with random weights, built fresh for each test."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D


class Mlp(nn.Module):
    """Linear and Conv1D layers, wide and narrow, with and without bias."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.gate = nn.Linear(6, 10, bias=False)
        self.conv = Conv1D(6, 10)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.conv(torch.tanh(self.up(x)) * self.gate(x)))


@pytest.fixture
def mlp():
    torch.manual_seed(0)
    return Mlp()


@pytest.fixture
def bert():
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=60)
    return BertForSequenceClassification(config).eval()


@pytest.fixture
def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=60, n_positions=32)).eval()
