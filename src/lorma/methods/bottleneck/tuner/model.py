"""The tuner of bottleneck adapters: where they go where the configuration does not say."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, ClassVar

from torch import nn
from transformers.pytorch_utils import Conv1D

from lorma.methods.bottleneck.tuner.layer import BottleneckLayer, Linear
from lorma.tuners.kinds import Kinds, from_pattern
from lorma.tuners.model import AdapterModel

ATTENTION_OUTPUTS = (
    r"attention\.output\.dense",  # BERT, RoBERTa, ELECTRA, DeBERTa
    r"attention\.out_lin",  # DistilBERT
    r"attention\.attn\.o",  # MPNet
    r"self_attn\.o_proj",  # Llama, Mistral, Qwen, Gemma, Phi-3, OLMo
    r"self_attn\.(out_proj|dense)",  # OPT, BART; Phi
    r"attn\.(c_proj|out_proj)",  # GPT-2; GPT-J
    r"(self_)?attention\.dense",  # BLOOM, Falcon; GPT-NeoX
    r"(SelfAttention|EncDecAttention)\.o",  # T5
)
FEED_FORWARD_OUTPUTS = (
    r"\d+\.output\.dense",  # BERT and its relatives, MPNet
    r"ffn\.lin2",  # DistilBERT
    r"mlp\.(down_proj|c_proj|fc2|fc_out|dense_4h_to_h)",  # Llama and its like; GPT-2; Phi; GPT-J; BLOOM, Falcon, NeoX
    r"\d+\.fc2",  # OPT, BART
    r"DenseReluDense\.wo",  # T5
)
"""Names of the projections before the residual sums, as regular expressions for the end of a module's path."""


class BottleneckModel(AdapterModel):
    """A model with bottlenecks on outputs of its layers; built by ``peft.get_peft_model``."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    kinds: ClassVar[Kinds] = {nn.Linear: Linear, Conv1D: Linear}

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        """As in PEFT; target modules that are left out are found by their names.

        Raises:
            ValueError: if the model has none of the known names, or ``layers_to_transform`` is given as well.
        """
        if peft_config.target_modules is None:
            if peft_config.layers_to_transform is not None:
                raise ValueError("layers_to_transform needs target_modules to be given too")
            both: list[tuple[str, ...]] = [ATTENTION_OUTPUTS, FEED_FORWARD_OUTPUTS]
            kinds = both if peft_config.placement == "houlsby" else both[1:]
            names = [name for name, _ in self.model.named_modules()]
            endings = [ending for kind in kinds for ending in self._endings(kind, names)]
            peft_config.target_modules = rf"(.*\.)?({'|'.join(endings)})"
        return super()._prepare_adapter_config(peft_config, model_config)

    def _endings(self, known: Iterable[str], names: list[str]) -> list[str]:
        found = [ending for ending in known if any(re.fullmatch(rf"(.*\.)?{ending}", name) for name in names)]
        if not found:
            raise ValueError(
                f"target_modules must be given: {type(self.model).__name__} has none of the names known for the "
                "projections before its residual sums"
            )
        return found

    def layer_options(self, config: Any, target: nn.Module, name: str) -> dict[str, Any]:
        return {"r": from_pattern(config.rank_pattern, name, config.r)}
