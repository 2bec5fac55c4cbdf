"""The mathematics of LoRMA and TLoRA in eager PyTorch: tensors in, tensors out.

Every function here is the reference that modules and kernels are tested against. None of them knows about modules,
PEFT or files. Symbols: ``W0`` (d × k) is the frozen weight, ``A`` (r × n) and ``B`` (n × r) the trainable factors with
n = d on side ``pre`` and n = k on side ``post``, ``s`` the scaling and ``M = I(BA)`` (n × n) the multiplier.
"""

from lorma.functional.algebra import (
    compose,
    compose_all,
    condition_number,
    inverse_delta_weight,
    invert,
    invert_plus,
    lora_form,
    singular_range,
)
from lorma.functional.multiplier import (
    INFLATIONS,
    SIDES,
    Inflation,
    Side,
    apply_multiplier,
    delta_weight,
    multiplier,
    multiplier_update,
    rotate_rows,
    update_matrix,
)
from lorma.functional.norms import multiplied_row_norms
from lorma.functional.projection import checksum, joint_checksum
from lorma.functional.start import init_factors
from lorma.functional.tri_matrix import (
    draw_projections,
    tri_matrix_delta,
    tri_matrix_lora_form,
    tri_matrix_update,
)

__all__ = [
    "INFLATIONS",
    "SIDES",
    "Inflation",
    "Side",
    "apply_multiplier",
    "checksum",
    "compose",
    "compose_all",
    "condition_number",
    "delta_weight",
    "draw_projections",
    "init_factors",
    "inverse_delta_weight",
    "invert",
    "invert_plus",
    "joint_checksum",
    "lora_form",
    "multiplied_row_norms",
    "multiplier",
    "multiplier_update",
    "rotate_rows",
    "singular_range",
    "tri_matrix_delta",
    "tri_matrix_lora_form",
    "tri_matrix_update",
    "update_matrix",
]
