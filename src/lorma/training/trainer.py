"""transformers' Trainer with the parts that a method brings."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback

from lorma.methods import Context, Hooks, Method
from lorma.schema import TrainSpec
from lorma.tasks import CausalLM, Task

STATE_FILE = "method_state.safetensors"


class MethodTrainer(Trainer):
    """Takes the optimizer from the method where it has its own, and calls the method's hooks."""

    def __init__(self, method: Method, hooks: Hooks, spec: TrainSpec, task: Task, **kwargs: Any) -> None:
        self.method, self.hooks, self.spec = method, hooks, spec
        super().__init__(**kwargs)
        self.callback_handler.callbacks.insert(0, _CallHooks(self))
        if not isinstance(task, CausalLM):
            # transformers leaves dividing by the number of accumulated batches to the model if its forward pass takes
            # any keyword. Sequence classifiers do take them, and do not divide: gradient and loss would be sums.
            self.model_accepts_loss_kwargs = False

    @property
    def plain_model(self) -> Any:
        """The model without the wrappers of several processes."""
        return self.accelerator.unwrap_model(self.model)

    def context(self) -> Context:
        """Where training stands, for the method's hooks."""
        state, skipped = self.state, self.accelerator.optimizer_step_was_skipped
        return Context(self.plain_model, self.optimizer, self.lr_scheduler, state.global_step, state.max_steps, skipped)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if self.method.optimizer is not None and self.optimizer is None:
            self.optimizer = self.method.optimizer(self.plain_model, self.spec)
        return super().create_optimizer(model)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if not self.control.should_training_stop:  # as of a run that goes on after its last step
            super()._run_epoch(*args, **kwargs)

    def load_weights(self, checkpoint: Path) -> None:
        """Give the trained model the weights of a checkpoint, after training."""
        if not self.hooks.restores_weights:
            self.state.best_model_checkpoint = str(checkpoint)
            self._load_best_model()
        load_state(self.hooks, self.plain_model, checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.hooks.restores_weights:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_state(self.hooks, self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint))


class _CallHooks(TrainerCallback):
    """The method's hooks at their places in the Trainer's loop."""

    def __init__(self, trainer: MethodTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.hooks.start(self.trainer.context())

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.hooks.before_step(self.trainer.context())

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.hooks.after_step(self.trainer.context())

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            save_state(self.trainer.hooks, self.trainer.plain_model, folder)


def save_state(hooks: Hooks, model: Any, checkpoint: Path) -> None:
    """Write what a method has to remember into a checkpoint, if it has to."""
    tensors, values = hooks.state_dict(model)
    if tensors or values:
        kept = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {key: json.dumps(value) for key, value in values.items()}
        partial = checkpoint / f".{STATE_FILE}.tmp"
        save_file(kept, partial, metadata=metadata)
        os.replace(partial, checkpoint / STATE_FILE)


def load_state(hooks: Hooks, model: Any, checkpoint: Path) -> None:
    """Give a method what :func:`save_state` has written."""
    names = [STATE_FILE, *([hooks.earlier_state_file] if hooks.earlier_state_file else [])]
    file = next((checkpoint / name for name in names if (checkpoint / name).is_file()), None)
    if file is None:
        return
    with safe_open(file, framework="pt") as opened:
        values = {key: json.loads(text) for key, text in (opened.metadata() or {}).items() if key != "format"}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    hooks.load_state_dict(model, tensors, values)
