"""What a model card says about a run: the recipe and what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorma.adapters.card import About
from lorma.models.settled import Settled
from lorma.models.source import ALIASES
from lorma.runs.recipe import Recipe
from lorma.yaml_text import dump_yaml


def about_training(recipe: Recipe, model: str, settled: Settled, summary: dict[str, Any]) -> About:
    """What a card says about a run. The folder may go anywhere: paths of this machine are left out of the text.

    Args:
        recipe: what was trained.
        model: the name by which the base model is remembered.
        settled: what training settled on the base model.
        summary: of the finished run.
    """
    content = recipe.model_dump(exclude={"output", "compare"}, exclude_none=True)
    content["model"] = {**content["model"], "name": model}
    content["data"] = {key: _without_folder(value) for key, value in content["data"].items()}
    metrics = "\n".join(f"| {name} | {_shown(value)} |" for name, value in summary["final_metrics"].items())
    versions = ", ".join(f"{name} {value}" for name, value in summary["versions"].items())
    text = (
        f"\n## Training\n\nTrained with `lorma train` for {summary['steps']} steps on {summary['device']} "
        f"({summary['trainable_parameters']:,} trainable parameters; {versions}).\n\n"
        f"| on the evaluation rows | |\n|---|--:|\n{metrics}\n\nThe recipe:\n\n```yaml\n"
        f"{dump_yaml(content)}```\n"
    )
    alias = model if model in ALIASES else None
    return About(alias, recipe.model.quantization, {**recipe.model.model_dump(), **settled.load}, text)


def _without_folder(value: Any) -> Any:
    """The name of a file that lies on this machine; anything else as it is."""
    return Path(value).name if isinstance(value, str) and Path(value).expanduser().exists() else value


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
