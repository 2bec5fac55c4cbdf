"""The configuration of a TLoRA adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from lorma.adapters import validation as check
from lorma.tuners.config import AdapterConfig
from lorma.tuners.registration import extend_peft_type


@dataclass
class TLoraConfig(AdapterConfig):
    """TLoRA: two fixed random matrices around a small trained one, and a trained scale (arXiv 2504.18735).

    ``W = W0 + α·(A·B·C)ᵀ`` for W0 of shape d × k; A (k × r) and C (r × d) are fixed and random, B (r × r), α trained.
    Adds ``r² + 1`` trainable numbers to each adapted layer, whatever its size. The start of training is B = 0, α = 1:
    outputs equal the base model's.

    A and C are no part of an adapter file: they are drawn from the seed, the name of the module and the shape, the same
    bits on every machine. The file holds a checksum of them, which is verified on load.

    Args:
        r: rank, the size of B.
        tlora_dropout: probability of zeroing an output of the *update*, in [0, 1); the paper takes 0.5.
        seed: what A and C are drawn from, an int from 0. Adapters of one seed share A and C where they share r.
        save_projection: write A and C into the adapter file as well, and read them from there.
        target_parameters: names of bare 2-D or 3-D parameters; the experts of a stack count as one tall matrix.
        The rest: as in :class:`lorma.tuners.config.AdapterConfig`.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed.
    """

    r: int = field(default=32, metadata={"help": "Rank, the size of B."})
    tlora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the output of the update."})
    seed: int = field(default=0, metadata={"help": "What the fixed matrices A and C are drawn from."})
    save_projection: bool = field(default=False, metadata={"help": "Write A and C into the adapter file."})

    kind_of_peft: ClassVar = extend_peft_type("TLORA")
    weight_names: ClassVar = ("tlora_B", "tlora_scale")

    def __post_init__(self) -> None:
        super().__post_init__()
        check.check_dropout("tlora_dropout", self.tlora_dropout)
        check.check_seed("seed", self.seed)
        check.check_bool("save_projection", self.save_projection)
