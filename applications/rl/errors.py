"""The failure that the command line shows as one line."""

from __future__ import annotations


class RunError(RuntimeError):
    """An expected failure that its message explains to the user, such as a renderer missing."""
