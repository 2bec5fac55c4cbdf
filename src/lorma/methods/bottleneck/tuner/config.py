"""The configuration of bottleneck adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from lorma.adapters import validation as check
from lorma.tuners.config import AdapterConfig
from lorma.tuners.registration import extend_peft_type

PLACEMENTS = ("houlsby", "pfeiffer")
ACTIVATIONS = ("gelu", "relu")


@dataclass
class BottleneckConfig(AdapterConfig):
    """Bottleneck adapters: ``h + up(f(down(h)))`` on the output h of a layer, before the residual sum.

    ``down`` (r × d) and ``up`` (d × r) have biases: 2·r·d + r + d trained numbers an adapted layer. ``up`` starts at
    zero, so that the start is the base model. The layer norms, which the papers train as well, stay frozen: PEFT's
    ``modules_to_save`` can train them. The update is not linear, so there is no merging.

    Args:
        r: the width of the bottleneck.
        placement: which layers are adapted where ``target_modules`` is left out: ``"houlsby"`` the output projections
            of attention and feed-forward (arXiv 1902.00751), ``"pfeiffer"`` only the latter (arXiv 2005.00247).
        activation: f, ``"gelu"`` or ``"relu"``.
        bottleneck_dropout: probability of zeroing an input of ``down``, in [0, 1).
        The rest: as in :class:`lorma.tuners.config.AdapterConfig`; ``target_parameters`` is not supported.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed.
    """

    r: int = field(default=8, metadata={"help": "Width of the bottleneck."})
    placement: str = field(default="houlsby", metadata={"help": "'houlsby' or 'pfeiffer'."})
    activation: str = field(default="gelu", metadata={"help": "'gelu' or 'relu'."})
    bottleneck_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the bottleneck."})

    kind_of_peft: ClassVar = extend_peft_type("BOTTLENECK")
    weight_names: ClassVar = ("bottleneck_down", "bottleneck_up")

    def __post_init__(self) -> None:
        super().__post_init__()
        check.check_choice("placement", self.placement, PLACEMENTS)
        check.check_choice("activation", self.activation, ACTIVATIONS)
        check.check_dropout("bottleneck_dropout", self.bottleneck_dropout)
        if self.target_parameters:
            raise ValueError(f"target_parameters={self.target_parameters!r} is not supported by bottleneck adapters")
