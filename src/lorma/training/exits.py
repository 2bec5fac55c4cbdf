"""How a process ended, in words."""

from __future__ import annotations

import signal

SHELL_OFFSET = 128
"""What a shell or launcher adds to the number of the signal that ended its command."""


def describe_exit(status: int) -> str:
    """The end of a process as the end of a sentence, by its exit code: negative for a signal, as Python has it."""
    number = -status if status < 0 else status - SHELL_OFFSET
    if number not in set(signal.Signals):
        return f"failed with exit code {status}"
    name = signal.Signals(number).name
    if number == signal.SIGKILL:
        return f"was killed ({name}), perhaps because memory ran out"
    return f"was ended by {name} ({(signal.strsignal(number) or 'a signal').lower()})"
