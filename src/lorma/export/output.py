"""What the folders hold that are written here, and so what may be replaced."""

from __future__ import annotations

from lorma.adapters.card import NAME as CARD_FILE
from lorma.adapters.folder import CONFIG_NAME, WEIGHTS_NAME
from lorma.files import META_FILE, FolderKind
from lorma.models.weights import INDEX_FILE, SINGLE_FILE

REPORT_FILE = "export.json"
SHARD_FILE = "model-{:05d}-of-{:05d}.safetensors"
GENERATION_FILE = "generation_config.json"
COPIED = f"""tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.txt vocab.json
    merges.txt bpe.codes tokenizer.model spiece.model spm.model source.spm target.spm sentencepiece.model
    sentencepiece.bpe.model tekken.json normalizer.json chat_template.jinja chat_template.json {GENERATION_FILE}
    preprocessor_config.json video_preprocessor_config.json processor_config.json LICENSE LICENSE.txt
    LICENSE.md""".split()
"""What is taken over from the base model as it is, where it is there."""
TEMPLATES = "additional_chat_templates"
"""A folder of chat templates beside the first."""

ADAPTER = FolderKind("an adapter", (CONFIG_NAME, WEIGHTS_NAME, REPORT_FILE, META_FILE, CARD_FILE))
MODEL = FolderKind(
    "a model",
    (
        *("config.json", SINGLE_FILE, SHARD_FILE.replace("{:05d}", "*"), INDEX_FILE, META_FILE, CARD_FILE),
        *(*COPIED, f"{TEMPLATES}/*.jinja"),
    ),
)
