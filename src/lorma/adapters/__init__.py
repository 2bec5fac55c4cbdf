"""Adapter folders: read with distrust, validated, described.

PEFT is imported before the first module here: then all tuners are imported, and find these modules whole.
"""

import peft  # noqa: F401
