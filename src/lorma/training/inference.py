"""Answering with what a run has trained, and measuring it again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorma.errors import InputError
from lorma.files import META_FILE
from lorma.tasks import CausalLM, Task, get_task
from lorma.training.methods.adalora import loss_of_the_task
from lorma.training.models import load_model, load_tokenizer, locate
from lorma.training.recipe import ModelSpec
from lorma.training.rundir import RunDirectory
from lorma.tuners.adapter_file import WEIGHTS_NAME, adapter_shapes

BATCH = 16


@dataclass(frozen=True)
class Predictor:
    """A model ready to answer, with the tokenizer, the task and the description of its data."""

    model: Any
    tokenizer: Any
    task: Task
    meta: dict[str, Any]

    @torch.no_grad()
    def predict(self, rows: Sequence[dict[str, Any]], max_new_tokens: int = 128) -> list[dict[str, Any]]:
        """One answer a row: ``label`` and ``score``, ``value``, or the ``completion`` (greedy, at most so many tokens).

        Raises:
            InputError: a row without the columns that the task reads.
        """
        answers: list[dict[str, Any]] = []
        for start in range(0, len(rows), BATCH):
            batch = self.task.encode(rows[start : start + BATCH], self.meta, self.tokenizer).to(self.model.device)
            if isinstance(self.task, CausalLM):
                answers.extend(self._complete(batch, max_new_tokens))
            else:
                decode: Any = self.task
                answers.extend(decode.decode_outputs(self.model(**batch).logits.float().cpu(), self.meta))
        return answers

    def _complete(self, batch: Any, max_new_tokens: int) -> list[dict[str, Any]]:
        ids = self.model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        new = ids[:, batch["input_ids"].shape[1] :]
        return [{"completion": text} for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]


def load_predictor(path: str | Path, *, trust_remote_code: bool = False) -> Predictor:
    """Load a finished run, its ``adapter`` folder, or its ``model`` folder.

    ``trust_remote_code`` lets the base model's repository run its own Python. What the folder itself says about that is
    not asked: adapters are passed around.

    Raises:
        InputError: a path that is none of them, an unfinished run, or weights that are broken or do not fit.
    """
    folder = _weights_folder(Path(path).expanduser())
    kept = _read_json(folder / META_FILE)
    try:
        asked = {**kept["model"], "trust_remote_code": trust_remote_code}
        spec, meta = ModelSpec.model_validate(asked), dict(kept["data"])
        task = get_task(meta["task"])
        for key in ("format", "text", "labels", "max_length"):
            meta[key]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / META_FILE} does not describe a task ({' '.join(str(error).split())})") from None
    whole = not (folder / "adapter_config.json").is_file()
    if whole:
        spec = spec.model_copy(update={"name": str(folder.resolve()), "gguf_file": None, "revision": None})
    tokenizer = load_tokenizer(spec)
    model: Any = load_model(spec, task.auto_model, **task.model_kwargs(meta, tokenizer))
    if not whole:
        model = load_adapter(model, folder)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return Predictor(model.to(device).eval(), tokenizer, task, meta)


def load_adapter(model: Any, folder: Path) -> Any:
    """``PeftModel.from_pretrained`` with every complaint about the files turned into one line.

    Raises:
        InputError: a missing, truncated or foreign weights file, a configuration with a wrong value, shapes that do
            not fit the base model.
    """
    from peft import PeftModel, get_peft_model_state_dict

    if not (folder / WEIGHTS_NAME).is_file():
        raise InputError(f"{folder} has no {WEIGHTS_NAME}; only safetensors are read")
    _read_json(folder / "adapter_config.json")
    try:
        found = adapter_shapes(folder / WEIGHTS_NAME)
        adapted = PeftModel.from_pretrained(model, str(folder))
    except KeyError as error:
        raise InputError(f"{folder} cannot be used: it has no entry {error}") from error
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise InputError(f"{folder} cannot be used: {' '.join(str(error).split())}") from error
    loss_of_the_task(adapted)
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in sorted(expected.keys() ^ found.keys()):
        fault = "lacks" if name in expected else "holds"
        raise InputError(f"{folder} cannot be used: its {WEIGHTS_NAME} {fault} {name}, so it belongs to another model")
    return adapted


def evaluate(run: RunDirectory, *, trust_remote_code: bool = False) -> dict[str, float]:
    """The metrics of a finished run on its evaluation rows, measured again from the saved weights.

    Raises:
        InputError: as :func:`load_predictor`, or if the data of the recipe cannot be read any more.
    """
    from transformers import Trainer
    from transformers.trainer_callback import PrinterCallback

    from lorma.training.run import training_arguments

    recipe = run.read_recipe()
    predictor = load_predictor(run.path, trust_remote_code=trust_remote_code)
    prepared = predictor.task.prepare(recipe.data, predictor.tokenizer)
    trainer = Trainer(
        model=predictor.model,
        args=training_arguments(recipe, predictor.task, run),
        eval_dataset=prepared.eval,
        data_collator=prepared.collator,
        compute_metrics=prepared.compute_metrics,
        processing_class=predictor.tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    measured = trainer.evaluate()
    reported = json.loads(run.summary_file.read_text(encoding="utf-8"))["final_metrics"]
    return {name: measured[f"eval_{name}"] for name in reported}


def usage_lines(run: RunDirectory) -> list[str]:
    """Lines of Python that use the adapter of a finished run, or its whole model."""
    recipe = run.read_recipe()
    if recipe.model.quantization:
        return [
            "from lorma.training.inference import load_predictor",
            f"model = load_predictor({str(run.path)!r}).model",
        ]
    task = get_task(recipe.task)
    whole = run.model.is_dir()
    meta = _read_json((run.model if whole else run.adapter) / META_FILE)["data"]
    source = locate(recipe.model)
    arguments = [repr(str(run.model) if whole else source.path)]
    if source.gguf_file and not whole:
        arguments.append(f"gguf_file={source.gguf_file!r}")
    if not isinstance(task, CausalLM) and not whole:
        arguments.append(f"num_labels={len(meta['labels'] or [0])}")
    if source.revision and not whole:
        arguments.append(f"revision={source.revision!r}")
    if recipe.model.dtype != "float32":
        arguments.append(f"dtype={recipe.model.dtype!r}")
    if recipe.model.trust_remote_code:
        arguments.append("trust_remote_code=True")
    load = f"transformers.{task.auto_model}.from_pretrained({', '.join(arguments)})"
    if whole:
        return ["import transformers", f"model = {load}"]
    return [
        "import lorma, peft, transformers",
        f"base = {load}",
        f"model = peft.PeftModel.from_pretrained(base, {str(run.adapter)!r})",
    ]


def _weights_folder(path: Path) -> Path:
    run = RunDirectory(path)
    if run.recipe_file.is_file():
        if not run.finished:
            raise InputError(f"{path} is an unfinished run; `lorma train` with its recipe goes on with it")
        return run.model if run.model.is_dir() else run.adapter
    if not path.is_dir():
        raise InputError(f"{str(path)!r} is neither a run directory nor an adapter folder: it does not exist")
    if not (path / META_FILE).is_file():
        raise InputError(f"{path} is neither a run directory nor an adapter trained by lorma: it has no {META_FILE}")
    return path


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object")
    return content
