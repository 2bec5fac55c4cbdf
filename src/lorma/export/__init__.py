"""Adapters for the world outside: plain LoRA folders, llama.cpp files, merged checkpoints."""
