"""Adapters for the tests of host libraries; PEFT's LoRA is the control."""

from peft import LoraConfig

from lorma import LormaConfig, TLoraConfig

WHERE = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
CONFIGS = {
    "lora": LoraConfig(**WHERE, r=4),
    "plus": LormaConfig(**WHERE, r=4),
    "dorma": LormaConfig(**WHERE, r=4, use_dora=True),
    "permutation": LormaConfig(**WHERE, r=4, inflation="permutation"),
    "tlora": TLoraConfig(**WHERE, r=8),
    "tlora_whole": TLoraConfig(**WHERE, r=8, save_projection=True),
}
