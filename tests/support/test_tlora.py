"""TLoRA on every kind of layer, held against the plain definition."""

import pytest

from support.features import FEATURES, not_applicable, observe
from support.tri import TALL, TriCase

LORMA_ONLY = {"composed", "linearly_combined", "hotswapped"}
SHARED = [f for f in FEATURES if f.group != "DoRA" and f.id not in LORMA_ONLY]
QUANTISED = [kind.name for kind in TALL if kind.read is not None]
INSIDE = ["Experts", "Experts, transposed", "Matrix parameter", "MultiheadAttention"]
REFUSED = (
    {(name, "dropout"): "dropout-parameters" for name in INSIDE}
    | {(name, "mixed_batch"): "mixed-parameters" for name in INSIDE}
    | {(name, "inverse"): "inverse-quantised" for name in QUANTISED}
    | {(name, "merge"): "choose" for name in QUANTISED}
    | {(name, "requantize"): "torchao-config" for name in QUANTISED if name.startswith("torchao")}
)


@pytest.mark.parametrize("feature", SHARED, ids=lambda feature: feature.id)
@pytest.mark.parametrize("kind", TALL, ids=lambda kind: kind.name.replace(" ", "_"))
def test_cell(kind, feature):
    case = TriCase(kind)
    refusal = REFUSED.get((kind.name, feature.id))
    note = not_applicable(feature, case)
    expected = f"n/a: {note}" if note else f"no: {refusal}" if refusal else "yes"
    assert observe(feature, case) == expected
