"""transformers' Trainer with the parts that a method brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer

from lorma.methods import Method
from lorma.schema import TrainSpec
from lorma.tasks import CausalLM, Task


class MethodTrainer(Trainer):
    """Takes the optimizer, and the way back from a checkpoint, from the method where it has its own."""

    def __init__(self, method: Method, spec: TrainSpec, task: Task, **kwargs: Any) -> None:
        self.method, self.spec = method, spec
        super().__init__(**kwargs)
        if not isinstance(task, CausalLM):
            # transformers leaves dividing by the number of accumulated batches to the model if its forward pass takes
            # any keyword. Sequence classifiers do take them, and do not divide: gradient and loss would be sums.
            self.model_accepts_loss_kwargs = False

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if self.method.optimizer is not None and self.optimizer is None:
            self.optimizer = self.method.optimizer(self.accelerator.unwrap_model(self.model), self.spec)
        return super().create_optimizer(model)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if not self.control.should_training_stop:  # as of a run that goes on after its last step
            super()._run_epoch(*args, **kwargs)

    def load_weights(self, checkpoint: Path) -> None:
        """Give the trained model the weights of a checkpoint, after training."""
        if self.method.restore is not None:
            self.method.restore(self.accelerator.unwrap_model(self.model), checkpoint)
        else:
            self.state.best_model_checkpoint = str(checkpoint)
            self._load_best_model()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.method.restore is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.method.restore(self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint))
