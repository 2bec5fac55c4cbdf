"""The schema of a recipe: one YAML file that says everything about a training run. Light to import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from lorma.errors import InputError, did_you_mean
from lorma.methods import Options, get_method
from lorma.models.source import ALIASES, find_recipe
from lorma.schema import AdapterSpec, CompareSpec, DataSpec, ModelSpec, OrEmpty, Section, TrainSpec
from lorma.tasks import TASKS
from lorma.tasks.files import read_text
from lorma.tasks.table import PACKAGED
from lorma.yaml_text import dump_yaml, load_yaml

DEFAULT_METHOD = "lorma-plus"
DELIMITERS = ("|", ";", ",", ":", "\t")


class Recipe(Section):
    """A training run, fully described. See each section's class for its keys."""

    task: str
    model: Annotated[ModelSpec, OrEmpty]
    data: Annotated[DataSpec, OrEmpty]
    method: str | dict[str, Any] = DEFAULT_METHOD
    adapter: Annotated[AdapterSpec, OrEmpty] = AdapterSpec()
    train: Annotated[TrainSpec, OrEmpty] = TrainSpec()
    compare: Annotated[CompareSpec, OrEmpty] = CompareSpec()
    seed: int = Field(default=0, ge=0, lt=2**32)
    output: str = Field(min_length=1)

    @property
    def method_name(self) -> str:
        """The name of the method, without its options."""
        return self.method if isinstance(self.method, str) else self.method["name"]

    @property
    def method_options(self) -> Options:
        """The method's own options, all of them."""
        given = {} if isinstance(self.method, str) else {k: v for k, v in self.method.items() if k != "name"}
        return get_method(self.method_name).read_options(given)

    @model_validator(mode="before")
    @classmethod
    def _one_spelling(cls, content: Any) -> Any:
        """A method by its name alone where its options are the defaults, else with those that are not."""
        method = content.get("method", DEFAULT_METHOD) if isinstance(content, dict) else None
        if isinstance(method, str):
            method = {"name": method}
        if not isinstance(method, dict):
            return content
        method = {"name": DEFAULT_METHOD, **method}
        if not isinstance(method["name"], str) or not all(isinstance(key, str) for key in method):
            raise InputError(f"method={method!r}: allowed are a name, or a name and the method's options")
        options = get_method(method["name"]).read_options({k: v for k, v in method.items() if k != "name"})
        changed = options.model_dump(exclude_defaults=True)
        return {**content, "method": {"name": method["name"], **changed} if changed else method["name"]}

    @model_validator(mode="after")
    def _names_exist(self) -> Recipe:
        if self.task not in TASKS:
            raise InputError(
                f"task={self.task!r} is unknown; allowed: {', '.join(TASKS)}{did_you_mean(self.task, TASKS)}"
            )
        for name in (self.method_name, *self.compare.methods):
            if get_method(name).build is None and self.model.quantization is not None:
                raise InputError(
                    f"method={name!r} is not possible with model.quantization={self.model.quantization!r}: weights "
                    "rounded to a few bits cannot follow small gradient steps; choose another method or null"
                )
        for name in self.compare.learning_rates:
            get_method(name)
        stopping, measured = self.train.early_stopping, TASKS[self.task].metrics
        if stopping is not None and stopping.metric is not None and stopping.metric not in measured:
            raise InputError(
                f"train.early_stopping.metric={stopping.metric!r} is not measured for {self.task}; allowed: "
                f"{', '.join(measured)}{did_you_mean(stopping.metric, measured)}"
            )
        return self

    def to_yaml(self) -> str:
        """The recipe with every default written out, as ``recipe.yaml`` of a run holds it."""
        return dump_yaml(self.model_dump())


def load_recipe(path: str | Path, overrides: list[str] | None = None, *, many_runs: bool = False) -> Recipe:
    """Read a recipe file and apply ``section.key=value`` overrides.

    ``path`` may also be the name of a recipe that ships with the package. Data files and model directories named in it
    are looked for from the current directory, then beside the recipe, and kept as absolute paths. An ``output`` left
    out is ``runs/<recipe>/<method>-seed<seed>``, or with ``many_runs`` the folder above that, where
    ``lorma compare`` puts its runs.

    Raises:
        InputError: a missing file, broken YAML, an unknown key (with the nearest one), a key that is given twice or a
            value that is not allowed.
    """
    file = find_recipe(path)
    text = read_text(file, f"recipe '{file}'")
    try:
        content = load_yaml(text)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file} must hold keys and values, found {type(content).__name__}")
    given = [override_key(override) for override in overrides or []]
    for override, key in zip(overrides or [], given, strict=True):
        if given.count(key) > 1:
            raise InputError(f"override {override!r}: {key!r} is given {given.count(key)} times")
    for override in sorted(overrides or [], key=lambda override: override_key(override).count(".")):
        apply_override(content, override)  # a whole section before its keys
    recipe = parse_recipe({"output": f"runs/{file.stem}", **content})
    output = recipe.output
    if "output" not in content and not many_runs:
        output = f"{output}/{recipe.method_name}-seed{recipe.seed}"
    data = {key: _located(value, file.parent) for key in ("train", "eval") if (value := getattr(recipe.data, key))}
    name = recipe.model.name if recipe.model.name in ALIASES else _located(recipe.model.name, file.parent)
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update=data),
            "model": recipe.model.model_copy(update={"name": name}),
            "output": str(Path(output).expanduser()),
        }
    )


def parse_recipe(content: dict[str, Any]) -> Recipe:
    """Check the content of a recipe.

    Raises:
        InputError: one line about the first thing that is wrong.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise InputError(_explain(error)) from None


def settings(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says by dotted keys, leaving out what does not change a run: ``compare``, ``output`` and
    ``train.report_to``.
    """
    dumped = recipe.model_dump(exclude={"compare": True, "output": True, "train": {"report_to"}})
    sections = {k: v for k, v in dumped.items() if isinstance(v, dict)}
    plain = {k: v for k, v in dumped.items() if k not in sections} | {"method": recipe.method_name}
    within = {f"{name}.{key}": value for name, keys in sections.items() for key, value in keys.items()}
    return plain | {key: value for key, value in within.items() if key != "method.name"}


def differences(first: Recipe, second: Recipe) -> list[str]:
    """Dotted keys in which the :func:`settings` of two recipes differ."""
    a, b = settings(first), settings(second)
    return [key for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]


def override_key(override: str) -> str:
    """What ``section.key=value`` changes."""
    return override.partition("=")[0]


def apply_override(content: dict[str, Any], override: str) -> None:
    """Change the content of a recipe by ``section.key=value``.

    Raises:
        InputError: it is not of that form.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise InputError(f"override {override!r} is not of the form section.key=value")
    try:
        # A delimiter alone is a text, whatever it means in YAML.
        value = text if text in DELIMITERS else load_yaml(text) if text else None
    except InputError as error:
        raise InputError(f"override {override!r}: {error}") from None
    *sections, last = key.split(".")
    place = content
    for section in sections:
        if place.get(section) is None:
            place[section] = {}
        if section == "method" and isinstance(place[section], str):
            place[section] = {"name": place[section]}
        place = place[section]
        if not isinstance(place, dict):
            raise InputError(f"override {override!r}: {section!r} is not a section")
    place[last] = value


def _located(name: str, beside: Path) -> str:
    if name in PACKAGED:
        return name
    for path in (Path(name).expanduser(), beside / name):
        if path.exists():
            return str(path.resolve())
    return name


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "str" and "[" not in str(part)]
    key = ".".join(place)
    if first["type"] == "extra_forbidden":
        allowed = _keys(place[:-1])
        return f"unknown key {key!r}; allowed here: {', '.join(allowed)}{did_you_mean(place[-1], allowed)}"
    if first["type"] == "missing":
        return f"key {key!r} is missing from the recipe"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "string_type" and isinstance(first["input"], int | float):
        message += "; text that reads as a number or a truth value stands in quotes"
    if first["type"] == "too_short":
        message = f"at least {first['ctx']['min_length']} must be given"
    if not key or isinstance(first["input"], BaseModel):
        return message
    return f"{key}: {message}" if _is_section(first) else f"{key}={first['input']!r}: {message}"


def _is_section(error: ErrorDetails) -> bool:
    """Whether an error is about how the keys of a section go together."""
    return error["type"] == "value_error" and isinstance(error["input"], dict)


def _keys(place: list[str]) -> list[str]:
    model: type[BaseModel] = Recipe
    for part in place:
        annotation = model.model_fields[part].annotation
        for kind in get_args(annotation) or (annotation,):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                model = kind
    return list(model.model_fields)
