"""The configuration of an SVFT adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from lorma.adapters import validation as check
from lorma.tuners.config import AdapterConfig
from lorma.tuners.registration import extend_peft_type

PATTERNS = ("plain", "random")


@dataclass
class SvftConfig(AdapterConfig):
    """SVFT: ``W = U(Σ + M)Vᵀ`` in the singular basis of the frozen weight, M sparse and trained (arXiv 2405.19597).

    Adds n = min(d, k) trained numbers to each adapted layer (``plain``, the diagonal of M), or with ``random`` besides
    as many as 2·r bands beside the diagonal hold: together (2r + 1)·n − r·(r + 1), which is how the counts of SVFT's
    random variant come about in Table 4 of arXiv 2506.07621. The start is the base model (M = 0). U and V are not
    saved; they are computed anew from W0, which takes a singular value decomposition of each adapted weight at the
    first forward pass and twice the memory of those weights.

    Args:
        r: for ``random``, how many bands on each side of the diagonal the random entries equal in number.
        pattern: ``"plain"`` or ``"random"``.
        svft_dropout: probability of zeroing an input of the *update*, in [0, 1).
        seed: of the random positions; layers of one width share them.
        The rest: as in :class:`lorma.tuners.config.AdapterConfig`; ``target_parameters`` is not supported.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed.
    """

    r: int = field(default=8, metadata={"help": "For 'random': as many random entries as r bands on each side hold."})
    pattern: str = field(default="plain", metadata={"help": "'plain' or 'random'."})
    svft_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the update."})
    seed: int = field(default=0, metadata={"help": "Of the random positions."})

    kind_of_peft: ClassVar = extend_peft_type("SVFT")
    weight_names: ClassVar = ("svft_M",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check.check_choice("pattern", self.pattern, PATTERNS)
        check.check_dropout("svft_dropout", self.svft_dropout)
        check.check_seed("seed", self.seed)
        if self.target_parameters:
            raise ValueError(f"target_parameters={self.target_parameters!r} is not supported by SVFT")
