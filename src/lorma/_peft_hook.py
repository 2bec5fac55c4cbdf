"""Importing a module of ours as soon as PEFT has been imported, without importing PEFT."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from lorma._quiet import without_remarks

PEFT = "peft"


def when_peft_is_imported(name: str) -> None:
    """Import the module ``name`` now if PEFT is imported already, else right after whoever imports it first."""
    module = sys.modules.get(PEFT)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        _import(name)
    else:
        sys.meta_path.insert(0, _Finder(name))


def _import(name: str) -> None:
    with without_remarks():
        importlib.import_module(name)


class _Finder(MetaPathFinder):
    """Finds PEFT where everyone finds it, and gives it a loader that goes on with ``name``."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != PEFT:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Any, finder: _Finder) -> None:
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self.loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self.loader
        with without_remarks():
            self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        _import(self.finder.name)
