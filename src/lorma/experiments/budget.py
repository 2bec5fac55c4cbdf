"""One budget of parameters for all methods: which ``adapter.r`` brings each nearest to it.

Nothing is computed from formulas. The base model is built without memory (on the meta device), the method's own
configuration is put on it, and what would train is counted, as a run counts it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from lorma.errors import InputError
from lorma.methods import Method
from lorma.runs.recipe import Recipe

TOLERANCE = 0.25
"""How far from the budget, relatively, a method may end and still count as fitted to it."""
UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


@dataclass(frozen=True)
class Choice:
    """What a method is trained with: its ``adapter.r``, its adapter parameters, and whether they fit the budget."""

    r: int
    parameters: int
    fits: bool


def parse_budget(text: str) -> int:
    """``0.3M``, ``300k`` or ``300000`` as a number of parameters.

    Raises:
        InputError: anything else, or less than one parameter.
    """
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?|\.[0-9]{1,15})([kKmMbB]?)", text.strip())
    count = round(float(found[1]) * UNITS[found[2].lower()]) if found else 0
    if count < 1:
        raise InputError(f"--budget={text!r} must be a number of parameters above 0, such as 0.3M, 300k or 300000")
    return count


class Counter:
    """Counts the adapter parameters of methods on the base model of a recipe, without its weights."""

    def __init__(self, recipe: Recipe) -> None:
        from lorma.models.load import load_config
        from lorma.tasks import get_task

        self.recipe = recipe
        self.task = get_task(recipe.task)
        self.config = load_config(recipe.model)

    def count(self, method: Method, r: int) -> int:
        """The adapter parameters of ``method`` with ``adapter.r = r`` and everything else as the recipe has it.

        Raises:
            InputError: the method is not possible on this model.
        """
        import torch
        import transformers

        from lorma.models.load import attach, count_parameters

        adapter = self.recipe.adapter.model_copy(update={"r": r})
        options = self.recipe.method_options if method.name == self.recipe.method_name else None
        auto: Any = getattr(transformers, self.task.auto_model)
        with torch.device("meta"):
            model = auto.from_config(self.config, trust_remote_code=self.recipe.model.trust_remote_code)
            adapted = attach(model, method, adapter, self.task.peft_task_type, options)
        return count_parameters(adapted, adapter, self.task.peft_task_type)["adapter_parameters"]

    def choose(self, method: Method, budget: int) -> Choice:
        """The r from 1 to the width of the model that comes nearest to ``budget``.

        A method without a knob, or one that does not come within a quarter of the budget, keeps the recipe's r.

        Raises:
            InputError: the method is not possible on this model.
        """
        own = self.recipe.adapter.r
        if method.knob is None:
            count = self.count(method, own)
            return Choice(own, count, abs(count - budget) <= TOLERANCE * budget)
        r, count = self._nearest(method, budget)
        if abs(count - budget) <= TOLERANCE * budget:
            return Choice(r, count, True)
        return Choice(own, self.count(method, own), False)

    def _nearest(self, method: Method, budget: int) -> tuple[int, int]:
        """The best r and its count, by interpolation: counts grow with r, mostly in proportion."""
        width = getattr(self.config.get_text_config(), "hidden_size", 4096)
        low, high = (1, self.count(method, 1)), (width, self.count(method, width))
        while high[0] - low[0] > 1 and low[1] < budget < high[1]:
            guess = low[0] + round((high[0] - low[0]) * (budget - low[1]) / (high[1] - low[1]))
            middle = min(max(guess, low[0] + 1), high[0] - 1)
            found = (middle, self.count(method, middle))
            if found[1] <= budget:
                low = found
                if low[1] == budget:
                    break
                after = (middle + 1, self.count(method, middle + 1)) if middle + 1 < high[0] else high
                if after[1] >= budget:
                    high = after
            else:
                high = found
        return min((low, high), key=lambda pair: (abs(pair[1] - budget), pair[0]))
