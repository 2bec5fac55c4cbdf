"""Recipes as YAML. Light to import."""

from __future__ import annotations

import re
from typing import Any

import yaml

from lorma.errors import InputError


class RecipeLoader(yaml.SafeLoader):
    """YAML as people write recipes: ``1e-3`` is a number, only ``true`` and ``false`` are truth values, so that ``no``
    and ``on`` can be labels and column names, and a key stands once in its place.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping as written, before any ``<<`` is filled in.

        Raises:
            InputError: a key that is there twice.
        """
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                raise InputError(f"key {name!r} is given twice, in line {lines[name]} and in line {line}")
            lines[name] = line
        return node


BOOL, FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (BOOL, FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
RecipeLoader.add_implicit_resolver(BOOL, re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
RecipeLoader.add_implicit_resolver(
    FLOAT,
    re.compile(r"[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf|\.nan)$"),
    list("-+.0123456789"),
)
