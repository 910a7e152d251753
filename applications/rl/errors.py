"""The failure that a command line shows as one line; see `applications.common.errors`."""

from applications.common.errors import RunError

__all__ = ["RunError"]
