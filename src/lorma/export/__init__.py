"""Adapters for the world outside: plain LoRA folders, llama.cpp files, merged checkpoints."""

from lorma.export.base import Base
from lorma.export.gguf import export_gguf
from lorma.export.lora import LayerReport, export_lora, export_lora_state_dict
from lorma.export.output import ADAPTER, MODEL
from lorma.export.truncation import Truncation

__all__ = [
    "ADAPTER",
    "MODEL",
    "Base",
    "LayerReport",
    "Truncation",
    "export_gguf",
    "export_lora",
    "export_lora_state_dict",
]
