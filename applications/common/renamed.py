"""Options that had another name in an earlier version: whoever uses the old name is told the new.

Each application keeps one mapping from old names to new ones beside its configuration.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Renamed = Mapping[str, str]
"""New name of an option by its old name."""

PACKAGE = "adjoint-matching"
FIRST = "0.1"
"""The version whose files do not say which version wrote them."""


def refuse_old_flags(arguments: Iterable[str], renamed: Renamed) -> None:
    """Refuse flags of a command line that have another name by now; ``--run.x`` is option x.

    Raises:
        ValueError: there is one; the message has its new name.
    """
    for argument in arguments:
        flag = argument.partition("=")[0]
        path, dot, last = flag.removeprefix("--").rpartition(".")
        name = last.removeprefix("no-").replace("-", "_")
        if flag.startswith("--") and name in renamed:
            new = renamed[name].replace("_", "-")
            raise ValueError(f"the option {flag} was renamed to --{path}{dot}{new}")


def refuse_old_arguments(owner: str, names: Iterable[str], renamed: Renamed) -> None:
    """Refuse keyword arguments of ``owner`` that have another name by now.

    Raises:
        TypeError: there is one; the message has its new name.
    """
    for name in names:
        if name in renamed:
            raise TypeError(f"{owner}: the argument {name!r} was renamed to {renamed[name]!r}")


def old_options(options: Iterable[str], renamed: Renamed) -> str:
    """List the options among ``options`` that were renamed, as ``old is now new``; '' if none."""
    return ", ".join(f"{name} is now {renamed[name]}" for name in options if name in renamed)


def version_of(config: Mapping[str, Any]) -> str:
    """Return the version of this package that wrote a config.json with the content ``config``."""
    versions = config.get("versions")
    return str(versions.get(PACKAGE, FIRST)) if isinstance(versions, Mapping) else FIRST
