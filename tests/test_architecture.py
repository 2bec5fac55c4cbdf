"""Imports go down the layers only, and in no circle; those for type checking and those inside functions included."""

import ast
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "lorma"
LAYERS = [
    {
        "errors",
        "files",
        "formatting",
        "gguf_header",
        "labels",
        "schema",
        "yaml_text",
        "_version",
        "_quiet",
        "_peft_hook",
    },
    {"functional"},
    {"kernels"},
    {"tuners", "adapters", "optim"},
    {"methods"},
    {"runs", "models", "tasks"},
    {"training", "deltas"},
    {"experiments", "serving", "export", "analysis"},
    {"cli"},
]
"""From the lowest to the highest; a part may import its own layer and those below."""
LAYER_OF = {part: number for number, layer in enumerate(LAYERS) for part in layer}
ALL_LAYERS = {"__init__", "__main__"}
"""Modules outside the order: the package itself, which hands out names of any layer."""


def module_name(file: Path) -> str:
    parts = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for file in SOURCE.rglob("*.py")}


@cache
def imported(module: str) -> frozenset[str]:
    """Modules of lorma that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in names}
    return frozenset((found & FILES.keys()) - {module})


def part_of(module: str) -> str:
    return [*module.split("."), "__init__"][1]


@pytest.mark.parametrize("part", sorted(LAYER_OF.keys() & {part_of(module) for module in FILES}))
def test_imports_go_down(part):
    for module in (module for module in FILES if part_of(module) == part):
        for other in imported(module):
            assert LAYER_OF.get(part_of(other), -1) <= LAYER_OF[part], f"{module} imports {other}"


def test_every_part_has_a_layer():
    assert {part_of(module) for module in FILES} <= LAYER_OF.keys() | ALL_LAYERS


def test_there_is_no_circle():
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " → ".join((*above[above.index(module) :], module))
        if module not in done:
            for other in sorted(imported(module)):
                visit(other, (*above, module))
            done.add(module)

    for module in sorted(FILES):
        visit(module, ())
