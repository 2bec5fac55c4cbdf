"""Imports go down the layers only, and in no circle; those for type checking and those inside functions included.

The benchmarks, above all of it, measure any part of the library and have an order of their own.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE, BENCHMARKS = ROOT / "src" / "lorma", ROOT / "benchmarks"
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
    package = SOURCE if SOURCE in file.parents else BENCHMARKS
    parts = file.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for package in (SOURCE, BENCHMARKS) for file in package.rglob("*.py")}
LIBRARY = [module for module in FILES if module.split(".")[0] == "lorma"]
BENCHMARK_IMPORTS = {
    "harness": {"harness", "lorma"},
    "cases": {"harness", "lorma"},
    "page": {"page"},
    "__init__": set(),
}
"""What each part of the benchmarks may import: a case no other case, and the page reads files alone."""


@cache
def imported(module: str) -> frozenset[str]:
    """Modules of the library and of the benchmarks that a module imports, anywhere in it."""
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


@pytest.mark.parametrize("part", sorted(LAYER_OF.keys() & {part_of(module) for module in LIBRARY}))
def test_imports_go_down(part):
    for module in (module for module in LIBRARY if part_of(module) == part):
        for other in imported(module):
            assert other in LIBRARY, f"{module} imports {other}"
            assert LAYER_OF.get(part_of(other), -1) <= LAYER_OF[part], f"{module} imports {other}"


def test_every_part_has_a_layer():
    assert {part_of(module) for module in LIBRARY} <= LAYER_OF.keys() | ALL_LAYERS


@pytest.mark.parametrize("module", sorted(FILES.keys() - set(LIBRARY)))
def test_benchmarks_share_only_the_harness(module):
    parts = {"lorma" if other in LIBRARY else part_of(other) for other in imported(module)}
    assert parts <= BENCHMARK_IMPORTS[part_of(module)], f"{module} imports {sorted(imported(module))}"


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
