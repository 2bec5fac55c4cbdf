"""All features, what has no meaning where, why something is refused, and how a cell's outcome is observed."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from traceback import walk_tb

import lorma
from support import adapters, dora, files, merging, running, training
from support.case import INFLATIONS, SIDES, Case
from support.kinds import KINDS

SOURCE = Path(lorma.__file__).parent


@dataclass(frozen=True)
class Feature:
    """One column. ``check`` returns when the feature works; a text that it returns names a note or a limit."""

    title: str
    group: str
    check: Callable[[Case], str | None]
    meaning: str

    @property
    def id(self) -> str:
        return self.check.__name__


TRAINING, MERGING, QUANTISED, SEVERAL, FILES, RUNNING, DORA = GROUPS = (
    "Training",
    "Merging and undoing",
    "Merging into a quantised weight",
    "Several adapters",
    "Files",
    "Precision, compilation, memory",
    "DoRA",
)
FEATURES = [
    Feature(
        "Start",
        TRAINING,
        training.starts_as_the_base_model,
        "a fresh adapter leaves outputs as they are: bit for bit with `plus`, up to rounding with `permutation`",
    ),
    Feature(
        "Forward, backward",
        TRAINING,
        training.output_and_gradients,
        "output and the gradients of A, B and the input equal those of the base layer with the multiplied weight",
    ),
    Feature("Dropout", TRAINING, training.dropout, "`lorma_dropout`: random in training, on the update only"),
    Feature("Merge", MERGING, merging.merge, "`merge_adapter()` without further arguments: same outputs as before"),
    Feature("Unmerge: snapshot", MERGING, merging.snapshot, "the very bits come back, and again after a second merge"),
    Feature(
        "Unmerge: inverse", MERGING, merging.inverse, "no copy kept; the weight comes back within the reported bound"
    ),
    Feature("Unmerge: refuse", MERGING, merging.refuse, "no copy kept, and unmerging is an error"),
    Feature("Unload", MERGING, merging.merge_and_unload, "`merge_and_unload()` and `unload()` leave an ordinary model"),
    Feature("Safe merge", MERGING, merging.safe_merge, "`safe_merge=True` refuses NaN and changes nothing"),
    Feature("Requantise", QUANTISED, merging.requantize, '`quantized="requantize"`: same format, error reported'),
    Feature("Dequantise", QUANTISED, merging.dequantize, '`quantized="dequantize"`: an `nn.Linear` in its place'),
    Feature(
        "Two at once",
        SEVERAL,
        adapters.order,
        "they act in the order of activation, alike in forward, merged together and merged one by one",
    ),
    Feature(
        "Mixed batch",
        SEVERAL,
        adapters.mixed_batch,
        '`adapter_names=[…]`, one for each row, `"__base__"` among them, equals runs one by one',
    ),
    Feature("Compose", SEVERAL, adapters.composed, '`add_weighted_adapter(…, "compose")` equals both at once, exactly'),
    Feature("Linear mix", SEVERAL, adapters.linearly_combined, '`add_weighted_adapter(…, "linear")`, of the same rank'),
    Feature("Delete", SEVERAL, adapters.deleted, "`delete_adapter` leaves no trace; the others stay as they are"),
    Feature("Disable", SEVERAL, adapters.disabled, "`disable_adapter()` gives the base model, also when merged"),
    Feature("Save, load", FILES, files.saved_and_loaded, "adapters equal to the bit, outputs up to rounding"),
    Feature("Load lean", FILES, files.loaded_without_memory, "the same with `low_cpu_mem_usage=True`"),
    Feature(
        "Hot-swap", FILES, files.hotswapped, "`lorma.hotswap_adapter` with a folder of smaller rank and another alpha"
    ),
    Feature("Meta device", FILES, files.on_the_meta_device, "an adapter on a base model without memory, right count"),
    Feature("bfloat16 base", RUNNING, running.in_bfloat16, "output in bfloat16, factors in float32, close to exact"),
    Feature("float16 base", RUNNING, running.in_float16, "the same in float16"),
    Feature("Autocast", RUNNING, running.autocast, "`torch.autocast` to bfloat16 on a float32 base, with backward"),
    Feature("Compile", RUNNING, running.compiled, "`torch.compile(fullgraph=True)`: no graph break, same gradients"),
    Feature("Checkpoint", RUNNING, running.checkpointed, "gradient checkpointing, `use_reentrant=False`"),
    Feature("Reentrant", RUNNING, running.checkpointed_reentrant, "gradient checkpointing, `use_reentrant=True`"),
    Feature("DoRA", DORA, dora.dora, "`use_dora=True`: output and gradients, row norms taken as constants"),
    Feature("Merge", DORA, dora.dora_merged, "merged equals unmerged; a snapshot brings the very bits back"),
    Feature("Inverse", DORA, dora.dora_inverse, '`undo="inverse"`'),
    Feature("Save, load", DORA, dora.dora_saved, "adapters to the bit, outputs up to rounding, loaded lean or not"),
    Feature("Two at once", DORA, dora.dora_two_at_once, "alike in forward and merged together"),
    Feature("Mixed batch", DORA, dora.dora_mixed_batch, "equals runs one by one"),
    Feature("Combine", DORA, dora.dora_combined, "`add_weighted_adapter`"),
    Feature("Hot-swap", DORA, dora.dora_hotswapped, "with a folder of smaller rank and another alpha"),
    Feature("Compile", DORA, dora.dora_compiled, "`torch.compile(fullgraph=True)`: no graph break, same gradients"),
]

NOTES = {
    "projection": "With `none` the start is not the identity, by definition: I(BA) = s·BA has rank r. It is a "
    "projection of that rank, as near as one can get, and the suite checks that it is.",
    "not-quantised": "The weight is not quantised; an ordinary merge writes into it.",
}
"""Why a feature has no meaning somewhere."""

LIMITS = {
    "graph-break": "The norms need the weight, and `torch.compile` cannot trace how bitsandbytes reads it: there is a "
    "graph break in each such layer, and `fullgraph=True` is an error of PyTorch.",
}
"""What works only in part, and is compared as far as it does."""

REFUSALS = {
    "dora-plus": (
        r"^use_dora=True needs inflation='plus'",
        "DoRA needs the norms of the multiplied rows in each step, and only for `plus` have they a cheap closed form.",
    ),
    "dora-fused": (
        r"^use_dora=True is not supported with fused_projections",
        "DoRA is not there for fused projections; adapt the layer whole, without `fused_projections`.",
    ),
    "dora-parameters": (
        r"^use_dora=True is not supported on",
        "DoRA rescales a layer's outputs; what is multiplied here is a bare parameter inside a module.",
    ),
    "dora-inverse": (
        r"^undo='inverse' is not allowed for adapter .*: with use_dora the norms of the unmerged weight",
        "Taking DoRA out again needs the row norms of the weight that the merge has overwritten. Use a snapshot.",
    ),
    "dora-combine": (
        r"^adapter .* has use_dora=True, which is no product of low rank",
        "Rescaling rows has full rank, so several DoRA adapters cannot be joined into one of low rank.",
    ),
    "dropout-parameters": (
        r"^(lorma|tlora)_dropout=\S+ is not supported on",
        "Dropout acts on the input of the update. A bare parameter inside a module is multiplied as a weight, before "
        "it meets any input, so there is nothing to drop.",
    ),
    "mixed-parameters": (
        r"does not support mixed batches",
        "A bare parameter inside a module is multiplied as a weight; a mixed batch would need one for each row.",
    ),
    "singular": (
        r"^undo='inverse' is refused for adapter .* the condition number of its multiplier is inf",
        "s·BA has rank r, so what it took away cannot be computed back. Use a snapshot.",
    ),
    "inverse-quantised": (
        r"^undo='inverse' is not allowed for .*: its base is quantised",
        "Rounding into a quantised format cannot be inverted. Use a snapshot.",
    ),
    "choose": (
        r"^the base weight of .* is quantised; say what merging shall do",
        "Merging into a quantised weight rounds it again or gives up the quantisation. There is no default: say "
        '`quantized="requantize"` or `quantized="dequantize"`.',
    ),
    "torchao-config": (
        r"^quantized='requantize' needs to know how torchao quantised the model",
        "How torchao quantised a tensor is known only if transformers loaded the model with a `TorchAoConfig`; then "
        'requantising works (`tests/support/test_real_layers.py`). For others, `quantized="dequantize"`.',
    ),
    "combine-plus": (
        r"^adapter .* has inflation=.*; only plus is closed under products of low rank",
        "A product of two `plus` multipliers is again one, of rank r₁ + r₂. The others are not closed under products: "
        "activate the adapters together instead.",
    ),
}
"""Message of a refusal (a regular expression) and what it means for a user."""


def not_applicable(feature: Feature, case: Case) -> str | None:
    """The note on why this cell has no meaning, decided without trying."""
    return "not-quantised" if feature.group == QUANTISED and case.kind.read is None else None


def observe(feature: Feature, case: Case) -> str:
    """``yes``, ``partly: <limit>``, ``n/a: <note>`` or ``no: <refusal>``. Whatever else happens is an error."""
    note = not_applicable(feature, case)
    if note is not None:
        return f"n/a: {note}"
    try:
        note = feature.check(case)
    except (ValueError, TypeError) as error:
        if not raised_by_lorma(error):
            raise
        return f"no: {refusal(error)}"
    if note is None:
        return "yes"
    return f"{'partly' if note in LIMITS else 'n/a'}: {note}"


def raised_by_lorma(error: BaseException) -> bool:
    """Whether the ``raise`` stands in this package, not in one that it calls."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    return SOURCE in Path(frame.f_code.co_filename).parents


def refusal(error: BaseException) -> str:
    """The refusal that a message belongs to."""
    message = str(error)
    found = [name for name, (pattern, _) in REFUSALS.items() if re.search(pattern, message)]
    if len(found) != 1:
        raise AssertionError(f"an unknown refusal, or an ambiguous one {found}: {message}") from error
    return found[0]


def cells() -> list[tuple[Feature, Case]]:
    """Every cell, by kind, feature, inflation and side."""
    return [
        (feature, Case(kind, inflation, side))
        for kind in KINDS
        for feature in FEATURES
        for inflation in INFLATIONS
        for side in SIDES
    ]
