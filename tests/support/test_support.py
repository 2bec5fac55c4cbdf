"""Every cell of docs/support.md is examined again."""

import pytest

from support.case import INFLATIONS, SIDES
from support.features import LIMITS, NOTES, REFUSALS, cells, observe
from support.table import DOCUMENT, collapse, expand, parse, render

STATED = parse(DOCUMENT.read_text(encoding="utf-8"))
CELLS = {(case.kind.name, feature.id, case.inflation, case.side): (feature, case) for feature, case in cells()}


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "-".join(part.replace(" ", "_") for part in cell))
def test_cell(cell):
    assert observe(*CELLS[cell]) == STATED.get(cell), "docs/support.md is out of date; run: make support"


def test_the_document_covers_every_cell_and_is_what_the_command_writes():
    assert set(STATED) == set(CELLS)
    assert render(STATED) == DOCUMENT.read_text(encoding="utf-8")


def test_every_note_and_refusal_occurs():
    stated = {outcome.partition(": ")[2] for outcome in STATED.values()} - {""}
    assert stated == {*NOTES, *LIMITS, *REFUSALS}


@pytest.mark.parametrize(
    "different",
    [[], [("plus", "pre")], [("none", side) for side in SIDES], [("plus", "auto"), ("permutation", "auto")]],
)
@pytest.mark.parametrize("outcome", ["no: singular", "n/a: projection"])
def test_cells_can_be_read_back(different, outcome):
    where = [(inflation, side) for inflation in INFLATIONS for side in SIDES]
    grid = {key: outcome if key in different else "yes" for key in where}
    assert expand(collapse(grid)) == grid
