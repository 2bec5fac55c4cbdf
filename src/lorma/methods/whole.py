"""Methods that train the model itself: all of it, or its biases. They are saved as whole models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorma.errors import InputError
from lorma.methods.base import Method, register

if TYPE_CHECKING:
    from lorma.schema import AdapterSpec


def head_parameters(model: Any, adapter: AdapterSpec, task_type: str) -> dict[str, Any]:
    """Parameters of modules that every method trains whole: a classifier's head and ``adapter.modules_to_save``.

    They are found as PEFT finds them: a head by the names ``classifier`` and ``score`` where the task is a
    classification or regression of sequences, the others by the end of their names.
    """
    from peft.utils.constants import SEQ_CLS_HEAD_NAMES

    names = [*(adapter.modules_to_save or []), *(SEQ_CLS_HEAD_NAMES if task_type == "SEQ_CLS" else [])]
    modules = [path for path, _ in model.named_modules() if any(f".{path}".endswith(f".{name}") for name in names)]
    return {
        path: parameter
        for path, parameter in model.named_parameters()
        if any(path.startswith(f"{module}.") for module in modules)
    }


def _biases_only(model: Any, adapter: AdapterSpec, task_type: str) -> None:
    heads = head_parameters(model, adapter, task_type)
    biases = {path for path, _ in model.named_parameters() if path.split(".")[-1] == "bias" and path not in heads}
    if not biases:
        raise InputError(f"method='bitfit' is not possible: {type(model).__name__} has no biases to train")
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(path in biases or path in heads)


register(Method("full", "W trained whole", "d·k", "—", None, knob=None))
register(
    Method(
        "bitfit",
        "W0, with b trained",
        "d",
        "BitFit, arXiv 2106.10199",
        None,
        knob=None,
        prepare=_biases_only,
    )
)
