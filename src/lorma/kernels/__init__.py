"""Hand-written backward passes for what :mod:`lorma.functional` defines, and the one place that chooses between them.

Tensors in, tensors out: no modules, no configurations, no PEFT. :func:`multiply` applies a multiplier to activations,
whoever made them, :func:`multiply_rows` one for each row of a batch; :func:`multiplied_linear` computes a whole layer
where its weight can be read, which saves memory (LoRMA₊) or time (LoRMAπ). Each form is tested against the eager
formula, which also takes its place where it cannot serve (see :mod:`lorma.kernels.form`).
"""

from lorma.kernels.context import add_product, under_autocast
from lorma.kernels.dispatch import multiplied_linear, multiply, multiply_rows, rows_belong_together
from lorma.kernels.tensor_cache import TensorCache

__all__ = [
    "TensorCache",
    "add_product",
    "multiplied_linear",
    "multiply",
    "multiply_rows",
    "rows_belong_together",
    "under_autocast",
]
