"""What the tuners of all methods share: PEFT integration, without any method of its own.

PEFT is imported before the first module here: then all tuners are imported, and find these modules whole.
"""

import peft  # noqa: F401
