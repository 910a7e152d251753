"""Options that had another name in an earlier version: whoever uses the old name is told the new.

A configuration derives from `RefusesOldNames` and has one mapping from old names to new ones,
`renamed`.  The same mapping serves its constructor, its command line and the files of its runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeVar

Configuration = TypeVar("Configuration", bound="RefusesOldNames")

Renamed = Mapping[str, str]
"""New name of an option by its old name."""


class RefusesOldNames:
    """A base of configurations whose constructor refuses options by a name of an earlier version.

    Attributes:
        renamed: new name of an option by its old name.
    """

    renamed: ClassVar[Renamed] = {}

    def __new__(cls: type[Configuration], *arguments: Any, **options: Any) -> Configuration:
        """Make the object, for ``__init__`` to fill.

        Raises:
            TypeError: an option has another name by now; the message has it.
        """
        for name in options:
            if name in cls.renamed:
                raise TypeError(
                    f"{cls.__name__}: the argument {name!r} was renamed to {cls.renamed[name]!r}"
                )
        return super().__new__(cls)


def refuse_old_flags(arguments: Iterable[str], renamed: Renamed) -> None:
    """Refuse flags of a command line that have another name by now; ``--run.x`` is option x.

    Raises:
        ValueError: there is one; the message has its new name.
    """
    for argument in arguments:
        flag = argument.partition("=")[0]
        path, dot, last = flag.removeprefix("--").rpartition(".")
        no = "no-" if last.startswith("no-") else ""
        name = last.removeprefix(no).replace("-", "_")
        if flag.startswith("--") and name in renamed:
            new = no + renamed[name].replace("_", "-")
            raise ValueError(f"the option {flag} was renamed to --{path}{dot}{new}")


def old_options(options: Iterable[str], renamed: Renamed) -> str:
    """List the options among ``options`` that were renamed, as ``old is now new``; '' if none."""
    return ", ".join(f"{name} is now {renamed[name]}" for name in options if name in renamed)
