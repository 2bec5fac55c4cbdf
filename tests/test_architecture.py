"""Imports go one way."""

import ast
from pathlib import Path

import pytest

import lorma

SOURCE = Path(lorma.__file__).parent
MAY_IMPORT = {
    "functional": set(),
    "kernels": {"functional"},
    "tuners": {"kernels", "functional", "errors"},
    "tasks": {"errors"},
    "analysis": {"errors", "files", "yaml_text"},
    "training": {"tuners", "tasks", "analysis", "errors", "files", "gguf_header", "yaml_text", "_version"},
    "export": {"tuners", "kernels", "functional", "errors", "files", "gguf_header", "_version"},
    "cli": {"training", "export", "tasks", "analysis", "errors", "files", "_version"},
}


def imported(file: Path) -> set[str]:
    """Names of lorma's own parts that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lorma":
            parts = (node.module or "").split(".")[1:]
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("lorma.")}
    return found


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_go_one_way(part):
    files = list((SOURCE / part).rglob("*.py"))
    assert files
    for file in files:
        assert imported(file) <= MAY_IMPORT[part] | {part}, file
