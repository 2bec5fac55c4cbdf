"""Adapters for the world outside: plain LoRA folders, llama.cpp files, merged checkpoints."""

from lorma.deltas.truncation import Truncation
from lorma.export.gguf import export_gguf
from lorma.export.lora import LayerReport, export_lora, export_lora_state_dict
from lorma.export.output import ADAPTER, MODEL
from lorma.models.structure import Base

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
