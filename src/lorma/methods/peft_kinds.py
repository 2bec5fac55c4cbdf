"""The adapters of PEFT's own methods that are read here: those that recipes can name.

Others load further files or tokenizers by name.
"""

from lorma.adapters.kinds import AdapterKind, register_kind
from lorma.methods.adalora import loss_of_the_task

register_kind(
    AdapterKind(
        "LORA",
        title=lambda config: "DoRA" if config.use_dora else "LoRA",
        not_lora=lambda config: "it is one",
        rank_dimension={"lora_A": 0, "lora_B": 1, "lora_embedding_A": 0, "lora_embedding_B": 1},
    )
)
register_kind(AdapterKind("ADALORA", title=lambda config: "ADALORA", ranks_change=True, after_loading=loss_of_the_task))
register_kind(AdapterKind("VERA", title=lambda config: "VERA", rank_dimension={"vera_lambda_d": 0}))
register_kind(AdapterKind("HIRA", title=lambda config: "HIRA", rank_dimension={"hira_A": 0, "hira_B": 1}))
register_kind(AdapterKind("OFT", title=lambda config: "OFT"))
