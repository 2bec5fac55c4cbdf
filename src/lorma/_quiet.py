"""Importing other libraries without their remarks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_remarks() -> Iterator[None]:
    """Hold back log messages up to warnings.

    Importing PEFT imports what is installed for quantisation, which tells at length of kernels it has not got here.
    """
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)
