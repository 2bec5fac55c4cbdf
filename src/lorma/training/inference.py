"""Answering with what a run has trained, and measuring it again."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

from lorma.adapters.card import base_code, predictor_code, use_code
from lorma.adapters.folder import CONFIG_NAME, DELTA, WEIGHTS_NAME, check_whole_modules, read_adapter
from lorma.adapters.kinds import kind_of
from lorma.adapters.untrusted import read_json
from lorma.errors import InputError, one_line, reading
from lorma.files import META_FILE
from lorma.models.load import load_model, load_tokenizer, locate
from lorma.models.positions import position_limit
from lorma.models.settled import read_settled
from lorma.runs.directory import RunDirectory
from lorma.runs.locate import find_base, named_base, read_meta
from lorma.tasks import CausalLM, Task, get_task
from lorma.tasks.stopping import stop_token_ids
from lorma.tuners.names import renamed

BATCH = 16


@dataclass(frozen=True)
class Predictor:
    """A model ready to answer, with the tokenizer, the task and the description of its data.

    Attributes:
        stops: tokens that end a completion.
        positions: tokens of a prompt and its completion together, at most; None where nothing limits them.
    """

    model: Any
    tokenizer: Any
    task: Task
    meta: dict[str, Any]
    stops: tuple[int, ...] = ()
    positions: int | None = None

    @torch.no_grad()
    def predict(
        self, rows: Sequence[dict[str, Any]], max_new_tokens: int = 128, *, say: Callable[[str], object] | None = None
    ) -> list[dict[str, Any]]:
        """One answer a row: ``label`` and ``score``, ``value``, or the ``completion``.

        A completion is greedy. It ends at the first of the model's stop tokens, after ``max_new_tokens``, or where the
        model has no more positions.

        Args:
            say: called with a line where positions allow fewer tokens than ``max_new_tokens``.

        Raises:
            InputError: a row without the columns that the task reads, or with a prompt that fills all positions.
        """
        batches = [
            self.task.encode(rows[start : start + BATCH], self.meta, self.tokenizer)
            for start in range(0, len(rows), BATCH)
        ]
        answers: list[dict[str, Any]] = []
        if isinstance(self.task, CausalLM):
            rooms = [self._room(batch, BATCH * number) for number, batch in enumerate(batches)]
            least = min((room for batch in rooms for room in batch), default=max_new_tokens)
            if least < max_new_tokens and say is not None:
                say(
                    f"note: the model has {self.positions} positions, so that completions are bounded by what the "
                    f"prompt leaves of them, here by {least} tokens and not by {max_new_tokens}"
                )
            for batch, room in zip(batches, rooms, strict=True):
                answers.extend(self._complete(batch.to(self.model.device), room, max_new_tokens))
            return answers
        decode: Any = self.task
        for batch in batches:
            logits = self.model(**batch.to(self.model.device)).logits
            answers.extend(decode.decode_outputs(logits.float().cpu(), self.meta))
        return answers

    def _room(self, batch: Any, before: int) -> list[int]:
        """The tokens that may follow each prompt; ``before`` is how many rows lie before this batch."""
        room = [(self.positions or sys.maxsize) - length for length in batch["attention_mask"].sum(1).tolist()]
        for number, left in enumerate(room, start=before + 1):
            if left < 1:
                raise InputError(
                    f"row {number} to predict: its prompt has {(self.positions or 0) - left} tokens and leaves none of "
                    f"the model's {self.positions} positions for a completion"
                )
        return room

    def _complete(self, batch: Any, room: list[int], max_new_tokens: int) -> list[dict[str, Any]]:
        """Completions of one batch. Prompts near the last position go alone, so that they do not shorten others."""
        together = [row for row, left in enumerate(room) if left >= max_new_tokens]
        groups = [together] if together else []
        texts: dict[int, str] = {}
        for group in groups + [[row] for row in range(len(room)) if row not in together]:
            mask = batch["attention_mask"][group]
            longest = int(mask.sum(1).max())
            new = self._generate(
                batch["input_ids"][group, -longest:],
                mask[:, -longest:],
                min(max_new_tokens, *(room[row] for row in group)),
            )
            texts |= dict(zip(group, self.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True))
        return [{"completion": texts[row]} for row in range(len(room))]

    def _generate(self, ids: Any, mask: Any, max_new_tokens: int) -> list[list[int]]:
        stops = set(self.stops)
        made = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=list(self.stops) or None,
            tokenizer=self.tokenizer,
        )
        new: list[list[int]] = made[:, ids.shape[1] :].tolist()
        return [list(takewhile(lambda token: token not in stops, row)) for row in new]


def load_predictor(path: str | Path, base: str | None = None, *, trust_remote_code: bool = False) -> Predictor:
    """Load a finished run, its ``adapter`` folder, or its ``model`` folder.

    ``base`` names another base model than the recorded one, for instance where its folder was moved: an alias, a
    directory, a GGUF file or a hub name. Precision and quantisation stay as recorded.

    ``trust_remote_code`` lets the base model's repository run its own Python. What the folder itself says about that is
    not asked: adapters are passed around.

    Raises:
        InputError: a path that is none of them, an unfinished run, weights that are broken or do not fit, a base model
            that is not there, or a ``base`` for what was trained whole.
    """
    folder = _weights_folder(Path(path).expanduser())
    spec, meta = read_meta(folder)
    spec, task = spec.model_copy(update={"trust_remote_code": trust_remote_code}), get_task(meta["task"])
    whole = not (folder / CONFIG_NAME).is_file()
    if whole and base is not None:
        raise InputError(f"--base={base!r}: {folder} was trained whole; it has no base model")
    if whole:
        spec = spec.model_copy(update={"name": str(folder.resolve()), "gguf_file": None, "revision": None})
    else:
        if base is not None:
            named = named_base(base)
            spec = spec.model_copy(update={"name": named.name, "gguf_file": named.gguf_file, "revision": None})
        find_base(folder, spec, named=base is not None)
    tokenizer = load_tokenizer(spec)
    meta["max_length"] = min(meta["max_length"], tokenizer.model_max_length)
    model: Any = load_model(spec, task.auto_model, **task.model_kwargs(meta, tokenizer))
    stops, positions = [], None
    if isinstance(task, CausalLM):
        stops = stop_token_ids(tokenizer, model.generation_config, read_settled(folder).stop_tokens)
        positions = position_limit(model.config, None, trust_remote_code)
    if not whole:
        model = load_adapter(model, folder)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return Predictor(model.to(device).eval(), tokenizer, task, meta, tuple(stops), positions)


def load_adapter(model: Any, folder: Path) -> Any:
    """The model with the adapter of a folder on it; nothing in the folder is trusted.

    The adapter is put on without memory (meta) first and compared with what the weights file says of itself. Only if
    every weight is there, has its place and fits are weights read.

    Raises:
        InputError: whatever is wrong with the folder, or does not fit the base model; one line.
    """
    adapter = read_adapter(folder)
    check_whole_modules(model, adapter)
    wrap = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(adapter.config.task_type, PeftModel)  # type: ignore[arg-type]
    refusal = f"{folder} cannot be used"
    kind = kind_of(adapter.config)
    bare = not kind.ranks_change  # else PEFT picks the ranks that are left by their values
    try:
        adapted = wrap(model, adapter.config, low_cpu_mem_usage=bare)
        state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        # PEFT also saves embeddings that are adapted or have been resized.
        copies = (
            get_peft_model_state_dict(adapted, save_embedding_layers=True) if adapter.tensors.keys() - state else {}
        )
        expected = {name: tuple(tensor.shape) for name, tensor in {**copies, **state}.items()}
        names = renamed(adapted, adapter.tensors, expected)
        found = {names[name]: info for name, info in adapter.tensors.items()}
        for name in sorted(found.keys() - expected.keys()):
            raise InputError(f"{refusal}: its {WEIGHTS_NAME} holds {name}, so it belongs to another model")
        for name in sorted(state.keys() - found.keys()):
            raise InputError(f"{refusal}: its {WEIGHTS_NAME} lacks {name}, so it belongs to another model")
        for name, shape in expected.items():
            if name in found and found[name].shape != shape:
                raise InputError(
                    f"{refusal}: {name} has shape {list(found[name].shape)}, the model has room for {list(shape)}"
                )
        dtypes = {name: parameter.dtype for name, parameter in adapted.named_parameters()}
        weights = {old: adapter.read(old) for old, name in names.items() if name in state}
        set_peft_model_state_dict(adapted, weights, low_cpu_mem_usage=bare)
        base = adapted.state_dict()
        for name in adapter.tensors.keys() - weights.keys():
            if name in base or not name.endswith(DELTA):  # tied rows, which PEFT saves twice of a resized vocabulary
                base[name].copy_(adapter.read(name))
        for name, parameter in adapted.named_parameters():
            parameter.data = parameter.data.to(dtypes[name])  # what is put in place of meta tensors has the file's
    except InputError:
        raise
    except KeyError as error:
        raise InputError(one_line(f"{refusal}: it has no entry {error}")) from error
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError, OSError) as error:
        raise InputError(one_line(f"{refusal}: {error}")) from error
    kind.after_loading(adapted)
    return adapted.eval()


def evaluate(run: RunDirectory, base: str | None = None, *, trust_remote_code: bool = False) -> dict[str, float]:
    """The metrics of a finished run on its evaluation rows, measured again from the saved weights.

    ``base`` as in :func:`load_predictor`.

    Raises:
        InputError: as :func:`load_predictor`, or if the data of the recipe cannot be read any more.
    """
    from transformers import Trainer
    from transformers.trainer_callback import PrinterCallback

    from lorma.training.run import training_arguments

    with reading():
        recipe = run.read_recipe()
    predictor = load_predictor(run.path, base, trust_remote_code=trust_remote_code)
    with reading():
        reported = json.loads(run.summary_file.read_text(encoding="utf-8"))["final_metrics"]
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
    return {name: measured[f"eval_{name}"] for name in reported}


def usage_lines(run: RunDirectory) -> list[str]:
    """Lines of Python that use the adapter of a finished run, or its whole model."""
    recipe = run.read_recipe()
    if recipe.model.quantization:
        return predictor_code(str(run.path))
    task, arguments = get_task(recipe.task), recipe.model.model_dump(include={"dtype", "trust_remote_code"})
    if run.model.is_dir():
        return ["import transformers", f"model = {base_code(task.auto_model, str(run.model), arguments)}"]
    source = locate(recipe.model)
    arguments |= {"gguf_file": source.gguf_file, "revision": source.revision, **read_settled(run.adapter).load}
    if not isinstance(task, CausalLM):
        meta = read_json(run.adapter, META_FILE)["data"]
        arguments["num_labels"] = len(meta["labels"] or [0])
    return use_code(base_code(task.auto_model, source.path, arguments), str(run.adapter))


@reading()
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
