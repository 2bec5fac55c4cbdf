"""One training run, from a checked recipe to a finished run directory."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from lorma import formatting as show
from lorma._version import __version__
from lorma.adapters.card import write_card
from lorma.files import META_FILE, write_atomic, write_folder
from lorma.methods import get_method
from lorma.models.load import attach, count_parameters, load_model, load_tokenizer, locate
from lorma.models.settled import Settled, settle, try_saving
from lorma.runs.convergence import loss_auc
from lorma.runs.directory import KEPT_CHECKPOINTS, RunDirectory
from lorma.runs.reading import SCHEMA_VERSION
from lorma.runs.recipe import Recipe, settings
from lorma.runs.trivial import metric_names, warnings_of
from lorma.tasks import Prepared, Task, get_task
from lorma.tasks.fingerprint import fingerprints
from lorma.training.callbacks import ProgressBar, RunRecorder
from lorma.training.card import about_training
from lorma.training.memory import peak_memory, reset_peak_memory
from lorma.training.processes import processes
from lorma.training.selection import Selection
from lorma.training.trackers import PROJECT, TrackedArguments, Trackers
from lorma.training.trainer import MethodTrainer


def train(recipe: Recipe, *, overwrite: bool = False, console: Console | None = None) -> RunDirectory:
    """Train a recipe in its output directory, going on from the last checkpoint of an unfinished run.

    Under ``accelerate launch`` or ``torchrun`` every process calls this; the first one writes.

    Returns:
        The finished run directory.

    Raises:
        InputError: before anything is written, for whatever in the recipe, the data or the model cannot be used.
        DivergedError: the loss became infinite or not a number.
    """
    console = console or Console(quiet=not processes().is_main_process, markup=False, highlight=False)
    run, task = RunDirectory(recipe.output), get_task(recipe.task)
    run.check(recipe, overwrite)
    data = fingerprints(recipe.data)
    run.check_data(data, overwrite)
    trackers = Trackers(recipe.train.report_to)
    set_seed(recipe.seed)
    reset_peak_memory()
    tokenizer = load_tokenizer(recipe.model)
    prepared = task.prepare(recipe.data, tokenizer)
    notes: list[str] = []
    base = load_model(recipe.model, task.auto_model, say=notes.append, **prepared.model_kwargs)
    settled = settle(recipe.model, task, base, tokenizer, prepared.model_kwargs, new_head=bool(notes))
    method, options = get_method(recipe.method_name), recipe.method_options
    hooks = method.hooks(options)
    model = attach(base, method, recipe.adapter, task.peft_task_type, options)
    hooks.prepare(model)
    if processes().is_main_process:
        saved = model.get_base_model() if hooks.saves_model else model
        try_saving(recipe.model, saved, tokenizer, notes.append)
    if recipe.train.gradient_checkpointing:
        base.enable_input_require_grads()

    bar = ProgressBar(console, recipe.method_name)
    try:
        with processes().main_process_first():
            if processes().is_main_process:
                run.open(recipe, overwrite, data)
                trackers.open(run)
            recorder, selection = RunRecorder(run), Selection(run, recipe.train, task)
        checkpoint = run.last_checkpoint()
        counts = count_parameters(model, recipe.adapter, task.peft_task_type)
        console.print(
            f"{recipe.method_name} on {recipe.model.name}: {counts['trainable_parameters']:,} trainable parameters "
            f"({counts['adapter_parameters']:,} in the adapter), {len(prepared.train):,} training and "
            f"{len(prepared.eval):,} evaluation rows, seed {recipe.seed}"
        )
        for note in notes:
            console.print(note)
        if checkpoint:
            console.print(f"  going on from step {run.last_step()}")

        trainer = MethodTrainer(
            method,
            hooks,
            recipe.train,
            task,
            model=model,
            args=training_arguments(recipe, task, run, trackers.run_name),
            train_dataset=prepared.train,
            eval_dataset=prepared.eval,
            data_collator=prepared.collator,
            compute_metrics=prepared.compute_metrics,
            processing_class=tokenizer,
            callbacks=[trackers, recorder, selection, bar],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        processes().wait_for_everyone()
        if trainer.state.global_step < trainer.state.max_steps:
            console.print(f"  stopped at step {trainer.state.global_step}: {selection.reason}")
        if trainer.state.global_step not in selection.steps:
            trainer.evaluate()
        best = selection.checkpoint() if recipe.train.keep == "best" else None
        if best and selection.best_step != trainer.state.global_step:
            trainer.load_weights(best)
        if processes().is_main_process:
            targets, trained = adapted_modules(model), hooks.finish(trainer.context())
            summary = _summary(
                recipe,
                task,
                run,
                recorder,
                selection,
                trainer.state.max_steps,
                counts,
                prepared,
                targets,
            )
            _save(trained, trainer, recipe, run, prepared.meta, settled, summary)
            write_atomic(run.summary_file, json.dumps(summary, indent=2) + "\n")
            for line in closing_lines(summary):
                console.print(line)
        trackers.close()
    finally:
        bar.close()
        run.close()
        trackers.close(failed=True)
    processes().wait_for_everyone()
    return run


def training_arguments(recipe: Recipe, task: Task, run: RunDirectory, run_name: str | None = None) -> TrainingArguments:
    """What transformers' Trainer is told for a recipe; ``run_name`` is what trackers call the run."""
    spec, cpu = recipe.train, not torch.accelerator.is_available()
    return TrackedArguments(
        settings(recipe),
        output_dir=str(run.checkpoints),
        num_train_epochs=spec.epochs,
        max_steps=spec.max_steps or -1,
        per_device_train_batch_size=spec.batch_size,
        per_device_eval_batch_size=spec.eval_batch_size,
        gradient_accumulation_steps=spec.gradient_accumulation_steps,
        learning_rate=spec.learning_rate,
        lr_scheduler_type=spec.schedule,
        warmup_steps=spec.warmup_ratio,
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        bf16=spec.precision == "bfloat16",
        fp16=spec.precision == "float16",
        gradient_checkpointing=spec.gradient_checkpointing or None,
        eval_strategy="steps" if spec.eval_steps else "epoch",
        eval_steps=spec.eval_steps,
        save_strategy="steps" if spec.save_steps else "epoch",
        save_steps=spec.save_steps or 500,
        save_total_limit=KEPT_CHECKPOINTS + (spec.keep == "best"),
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        label_names=["labels"],
        prediction_loss_only=task.primary_metric == "loss",
        seed=recipe.seed,
        use_cpu=cpu,
        dataloader_pin_memory=not cpu,
        disable_tqdm=True,
        report_to="none",  # Trackers is one of the callbacks
        run_name=run_name,
        project=os.getenv("TRACKIO_PROJECT", PROJECT),
    )


def _evaluations(run: RunDirectory) -> dict[int, dict[str, Any]]:
    """The metrics of each evaluation by its step."""
    return {
        entry["step"]: {key.removeprefix("eval_"): value for key, value in entry.items() if key.startswith("eval_")}
        for entry in run.metrics()
        if "eval_loss" in entry
    }


def _save(
    model: Any,
    trainer: Trainer,
    recipe: Recipe,
    run: RunDirectory,
    meta: dict[str, Any],
    settled: Settled,
    summary: dict[str, Any],
) -> None:
    name = locate(recipe.model).remembered

    def fill(folder: Path) -> None:
        if hasattr(model, "peft_config"):
            # The folder may go anywhere, and the path of the base model on this machine should not go with it.
            base = model.get_base_model()
            base.name_or_path = base.config._name_or_path = name
            model.peft_config["default"].base_model_name_or_path = name
            model.save_pretrained(folder, save_embedding_layers=False)
            write_card(folder, model.peft_config["default"], about_training(recipe, name, settled, summary))
        else:
            model.save_pretrained(folder)
            tokenizer: Any = trainer.processing_class
            tokenizer.save_pretrained(folder)
        asked = recipe.model.model_dump(exclude={"trust_remote_code"})
        kept = {"model": asked | {"name": name}, "data": meta, "settled": settled.as_json()}
        (folder / META_FILE).write_text(json.dumps(kept, indent=2, ensure_ascii=False), encoding="utf-8")

    write_folder(run.adapter if hasattr(model, "peft_config") else run.model, fill)


def _summary(
    recipe: Recipe,
    task: Task,
    run: RunDirectory,
    recorder: RunRecorder,
    selection: Selection,
    planned_steps: int,
    counts: dict[str, int],
    prepared: Prepared,
    targets: list[str] | str | None,
) -> dict[str, Any]:
    entries = run.metrics()
    points = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
    evaluations = _evaluations(run)
    predicted_classes = {step: metrics.pop("predicted_classes", None) for step, metrics in evaluations.items()}
    classes = prepared.meta["labels"] or []
    last = max(evaluations)
    best = last if selection.best_step is None else selection.best_step
    saved = best if recipe.train.keep == "best" else last
    return {
        "schema_version": SCHEMA_VERSION,
        "method": recipe.method_name,
        "task": recipe.task,
        "model": recipe.model.name,
        "seed": recipe.seed,
        "r": recipe.adapter.r if get_method(recipe.method_name).knob else None,
        "learning_rate": recipe.train.learning_rate,
        **counts,
        "steps": points[-1][0],
        "train_loss_auc": loss_auc(*zip(*points, strict=True)),
        "final_train_loss": points[-1][1],
        "primary_metric": task.primary_metric,
        "greater_is_better": task.greater_is_better,
        "saved_step": saved,
        "final_metrics": evaluations[saved],
        "last_metrics": evaluations[last],
        "best_step": best,
        "best_by": selection.metric,
        "best_metrics": evaluations[best],
        "planned_steps": planned_steps,
        "stopped_early": points[-1][0] < planned_steps,
        "predicted_classes": predicted_classes[saved],
        "positive_class": classes[1] if len(classes) == 2 else None,
        "trivial_baseline": None if prepared.trivial is None else asdict(prepared.trivial),
        "target_modules": targets,
        "train_rows": len(prepared.train),
        "eval_rows": len(prepared.eval),
        "seconds": recorder.seconds,
        "peak_memory_bytes": peak_memory(),
        "versions": {
            "python": platform.python_version(),
            "lorma": __version__,
            **{name: version(name) for name in ("torch", "transformers", "peft")},
        },
        "device": _device(),
    }


def adapted_modules(model: Any) -> list[str] | str | None:
    """``target_modules`` as PEFT settled them: names, or a regular expression; None for a model that trains whole."""
    targets = getattr(getattr(model, "peft_config", {}).get("default"), "target_modules", None)
    return sorted(targets) if isinstance(targets, (set, list, tuple)) else targets


def closing_lines(summary: dict[str, Any]) -> list[str]:
    """What a run ended with, what the trivial baseline reaches, and what is wrong with the run if something is."""
    names, trivial = metric_names(summary), summary["trivial_baseline"]

    def listed(metrics: dict[str, float | None]) -> str:
        return ", ".join(f"{names[name]} {show.metric(metrics[name])}" for name in names if name in metrics)

    lines = [f"  {summary['eval_rows']:,} evaluation rows: {listed(summary['final_metrics'])}"]
    if trivial is not None:
        lines.append(f"  {trivial['name']} ({trivial['prediction']!r} for every row): {listed(trivial['metrics'])}")
    found = warnings_of(summary)
    return lines + ([f"Warning: {summary['method']} {' and '.join(found)}."] if found else [])


def _device() -> str:
    if torch.cuda.is_available():
        return f"{processes().num_processes} × {torch.cuda.get_device_name()}"
    count = processes().num_processes
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread{'s' if threads > 1 else ''}" + (f" × {count} processes" if count > 1 else "")
