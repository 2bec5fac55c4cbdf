"""``python -m support.table`` (``make support``): examine every cell and write docs/support.md."""

import logging
import re
import sys
import warnings
from collections import Counter
from pathlib import Path

from support.case import INFLATIONS, SIDES
from support.features import FEATURES, GROUPS, LIMITS, NOTES, REFUSALS, Feature, cells, observe
from support.kinds import KINDS, Kind

DOCUMENT = Path(__file__).parents[2] / "docs" / "support.md"
HEAD = """\
# What works on which layer

Written by `make support`, which runs every feature on every kind of layer, with every inflation and side;
`tests/support/test_support.py` runs them all again in CI and fails if a cell says something else. Do not edit.
"""
READING = """\
A cell says **yes** (it works, compared with the plain definition), **partly** (it works with a limit), **no** (it is
refused with an error; the footnote says why) or **–** (the feature has no meaning there). Where inflations (`plus`,
`permutation`, `none`) or sides (`pre`, `post`, `auto`) differ, the cell says which: "plus only" or "plus: yes;
permutation, none: –". Where no side is mentioned, all three agree. Kinds that agree in everything share a row.
"""
KINDS_HEAD = """\
## Kinds of layers

The plain definition forms each multiplier in full, multiplies the weight (of a quantised layer: what it stands for)
and runs the base layer with it. Outputs, weights and gradients may be this far from it (norm of the difference over
the norm). bitsandbytes rounds activations to 8 bits (int8) in evaluation mode on a CPU.
Layers in bfloat16, float16 and under autocast may be 3e-2 away.

| Kind | What was built | Distance allowed |
|---|---|---|
"""
TLORA = """\
## TLoRA

These tables are LoRMA's. `tests/support/test_tlora.py` runs the same features on the same kinds of layers with TLoRA,
held against its own plain definition, except for what is LoRMA's alone: DoRA, fused projections (a fused layer is taken
whole, as any linear layer), hot-swapping, and joining adapters (`add_weighted_adapter`). All of it works but for what
is refused:

- **Dropout and mixed batches on stacked experts, bare parameters and `nn.MultiheadAttention`**, as with LoRMA.
- **Merging into a quantised base without saying how, and undoing that by subtraction**, as with LoRMA; **rounding back
  into a torchao weight** of which the model does not say how it was quantised.

`undo="inverse"` subtracts the update and is never badly conditioned. Updates are added, so active adapters may come in
any order, and a merge of some of them is never refused for it. With groups, experts or an attention one update runs
through all of them, so that these layers give no LoRA form.
"""
NEVER = """\
## What never works, and why

- **`out_proj` of an `nn.MultiheadAttention` by itself**, whose weight is read without calling the module: name the
  attention. One with `kdim` or `vdim` of its own is refused, as it keeps its weights apart.
- **An `nn.Embedding` with `max_norm`**, which changes its weight whenever it is read.
- **Undoing a merge without a copy in a quantised format, with `none` or with DoRA.** Rounding into few bits,
  multiplying by a matrix of rank r and rescaling rows all lose what an inverse would need. A snapshot restores every
  bit.
- **Undoing by the inverse where a multiplier is badly conditioned** (above 1e4): the bound on the error would say
  nothing. The merge is refused, with the number.
- **One low-rank adapter out of several `permutation` or `none` adapters.** Their products have no low rank, or another
  form. Several at once work; they are applied one after the other.
- **A mixed batch on stacked expert weights.** The module reads one weight for all rows.
- **Training through a merged weight.** A merged adapter is part of the weight; unmerge before training on.
"""
MARKS = {"yes": "yes", "partly": "partly", "no": "no", "n/a": "–"}
EVERY, BETWEEN = "every kind", " · "
Outcomes = dict[tuple[str, str, str, str], str]
"""(kind, feature, inflation, side) → what :func:`observe` returns."""


def mark(outcome: str) -> str:
    """How an outcome is written."""
    kind, _, reason = outcome.partition(": ")
    return MARKS[kind] + (f"[^{reason}]" if reason else "")


def unmark(text: str) -> str:
    """The outcome that is written so."""
    word, _, reason = text.removesuffix("]").partition("[^")
    (kind,) = (kind for kind, shown in MARKS.items() if shown == word)
    return f"{kind}: {reason}" if reason else kind


def collapse(grid: dict[tuple[str, str], str]) -> str:
    """One cell of a table out of the outcomes for each (inflation, side)."""
    rows = {inflation: tuple(grid[inflation, side] for side in SIDES) for inflation in INFLATIONS}
    distinct = list(dict.fromkeys(outcome for row in rows.values() for outcome in row))
    if len(distinct) == 1:
        return mark(distinct[0])
    works = [inflation for inflation, row in rows.items() if set(row) == {"yes"}]
    others = {outcome for inflation, row in rows.items() if inflation not in works for outcome in row}
    if works and len(others) == 1 and (refused := others.pop()).startswith("no: "):
        return f"{', '.join(works)} only{mark(refused).removeprefix('no')}"
    parts: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for inflation, row in rows.items():
        for outcome in dict.fromkeys(row):
            sides = tuple(side for side, found in zip(SIDES, row, strict=True) if found == outcome)
            parts.setdefault((sides, outcome), []).append(inflation)
    return "; ".join(
        ", ".join(inflations) + ("" if sides == SIDES else f" ({', '.join(sides)})") + f": {mark(outcome)}"
        for (sides, outcome), inflations in parts.items()
    )


def expand(text: str) -> dict[tuple[str, str], str]:
    """The inverse of :func:`collapse`."""
    works, only, reason = text.partition(" only[")
    if only:
        refused = unmark(f"no[{reason}")
        return {(i, s): "yes" if i in works.split(", ") else refused for i in INFLATIONS for s in SIDES}
    grid = {}
    for part in text.split("; "):
        where, _, outcome = part.rpartition(": ")
        inflations, _, sides = where.removesuffix(")").partition(" (")
        for inflation in inflations.split(", ") if inflations else INFLATIONS:
            for side in sides.split(", ") if sides else SIDES:
                grid[inflation, side] = unmark(outcome)
    return grid


def rows(outcomes: Outcomes, features: list[Feature]) -> dict[tuple[str, ...], list[str]]:
    """The rows of a table: cells → the kinds that have these."""
    found: dict[tuple[str, ...], list[str]] = {}
    for kind in KINDS:
        columns = tuple(
            collapse({(i, s): outcomes[kind.name, feature.id, i, s] for i in INFLATIONS for s in SIDES})
            for feature in features
        )
        found.setdefault(columns, []).append(kind.name)
    return found


def row(*columns: str) -> str:
    return f"| {' | '.join(columns)} |\n"


def distance_allowed(kind: Kind) -> str:
    dtype = str(kind.dtype).removeprefix("torch.")
    evaluation = f", {kind.eval_tolerance:.0e} in evaluation mode" if kind.eval_tolerance else ""
    return f"{kind.tolerance:.0e} ({dtype}){evaluation}".replace("e-0", "e-")


def render(outcomes: Outcomes) -> str:
    """The whole document."""
    count = Counter(outcome.partition(": ")[0] for outcome in outcomes.values())
    text = [
        HEAD,
        f"\n{len(outcomes):,} cells: {count['yes']:,} work, {count['partly']} work in part, ",
        f"{count['no']:,} are refused, {count['n/a']:,} have no meaning.\n\n",
        READING,
        "\n",
        KINDS_HEAD,
        *(row(kind.name, kind.built, distance_allowed(kind)) for kind in KINDS),
    ]
    for group in GROUPS:
        features = [feature for feature in FEATURES if feature.group == group]
        text += [f"\n## {group}\n\n", *(f"- **{feature.title}**: {feature.meaning}\n" for feature in features), "\n"]
        text += [row("Kind", *(feature.title for feature in features)), "|---" * (len(features) + 1) + "|\n"]
        for columns, kinds in rows(outcomes, features).items():
            text.append(row(EVERY if len(kinds) == len(KINDS) else BETWEEN.join(kinds), *columns))
    reasons = NOTES | LIMITS | {name: sentence for name, (_, sentence) in REFUSALS.items()}
    used = {outcome.partition(": ")[2] for outcome in outcomes.values()}
    text.append(f"\n{TLORA}\n{NEVER}\n")
    text += [f"[^{name}]: {reason}\n" for name, reason in reasons.items() if name in used]
    return "".join(text)


def parse(text: str) -> Outcomes:
    """The outcomes that a document states."""
    features = {(feature.group, feature.title): feature.id for feature in FEATURES}
    outcomes: Outcomes = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE):
        group = section.partition("\n")[0]
        if group not in GROUPS:
            continue
        header, _, *lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
        for first, *columns in lines:
            kinds = [kind.name for kind in KINDS] if first == EVERY else first.split(BETWEEN)
            for title, cell in zip(header[1:], columns, strict=True):
                for where, outcome in expand(cell).items():
                    outcomes |= {(kind, features[group, title], *where): outcome for kind in kinds}
    return outcomes


def main() -> int:
    """Examine every cell; write the document only if none of them is an error."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("error")
    outcomes: Outcomes = {}
    failed = 0
    for feature, case in cells():
        key = (case.kind.name, feature.id, case.inflation, case.side)
        try:
            outcomes[key] = observe(feature, case)
        except Exception as error:
            failed += 1
            print(f"{', '.join(key)}: {type(error).__name__}: {error}", file=sys.stderr)
    if failed:
        print(f"{failed} of {failed + len(outcomes)} cells failed; {DOCUMENT} is left as it is", file=sys.stderr)
        return 1
    DOCUMENT.write_text(render(outcomes), encoding="utf-8")
    print(f"{len(outcomes)} cells written to {DOCUMENT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
