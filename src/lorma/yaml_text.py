"""YAML read and written by one grammar, version 1.2, so that what is written reads back. Light to import."""

from __future__ import annotations

import io
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode
from ruamel.yaml.representer import SafeRepresenter

from lorma.errors import InputError

BREAKS = "\x85\u2028\u2029"


class _Strict(Composer):
    """Refuses a key that is given twice, before any ``<<`` is filled in, and text that no file can hold."""

    def compose_scalar_node(self, anchor: Any) -> ScalarNode:
        node: ScalarNode = super().compose_scalar_node(anchor)
        if any("\ud800" <= letter <= "\udfff" for letter in node.value):
            line = node.start_mark.line + 1
            raise InputError(f"not valid YAML: line {line}: {node.value!r} holds half a character (a surrogate)")
        return node

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        node: MappingNode = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                raise InputError(f"key {name!r} is given twice, in line {lines[name]} and in line {line}")
            lines[name] = line
        return node


class _Quoted(SafeRepresenter):
    """Escapes characters that YAML would take for line breaks and ruamel.yaml writes as they are."""

    def represent_str(self, data: str) -> ScalarNode:
        node: ScalarNode = super().represent_str(data)
        if not set(data).isdisjoint(BREAKS):
            node.style = '"'
        return node


_Quoted.add_representer(str, _Quoted.represent_str)


def _yaml() -> Any:
    yaml: Any = YAML(typ="safe", pure=True)
    yaml.Composer, yaml.Representer = _Strict, _Quoted
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    yaml.sort_base_mapping_type_on_output = False
    yaml.width = 2**16
    return yaml


def load_yaml(text: str) -> Any:
    """The content of one YAML document: ``1e-3`` is a number, ``no`` and ``on`` are texts (YAML 1.2).

    Raises:
        InputError: broken YAML, or a key that is given twice; one line.
    """
    try:
        return _yaml().load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise InputError(f"not valid YAML: line {mark.line + 1}, column {mark.column + 1}: {error.problem}") from None
    except InputError:
        raise
    except (YAMLError, ValueError, IndexError, RecursionError) as error:
        raise InputError(f"not valid YAML: {str(error).splitlines()[0]}") from None


def dump_yaml(content: Any) -> str:
    """``content`` (mappings, lists, texts, numbers, truth values, None) as YAML that :func:`load_yaml` reads back."""
    stream = io.StringIO()
    _yaml().dump(content, stream)
    return stream.getvalue()
