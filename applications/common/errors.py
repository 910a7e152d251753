"""Failures that a user can understand and mend; a command shows each as one line."""

from __future__ import annotations

from flows.training import CheckpointError, TrainingDiverged


class RunError(RuntimeError):
    """An expected failure explains itself to the user, such as a renderer that is missing."""


EXPECTED = (OSError, ValueError, ImportError, RunError, CheckpointError, TrainingDiverged)
"""Errors whose message is written for the user; a command shows it without a traceback."""


def describe(error: BaseException) -> str:
    """Return the message of an error; that of the system names the file, without its number."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    if error.filename is None:
        return error.strerror  # `flows.training.checkpoint` has put the path into the message
    return f"cannot access {error.filename}: {error.strerror}"
