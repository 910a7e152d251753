"""Objects of one's own on a command line: ``module:Name`` is ``Name`` in a Python module."""

from __future__ import annotations

import importlib
from typing import Any

from tyro.constructors import PrimitiveConstructorSpec

NAME_OR_OBJECT = PrimitiveConstructorSpec[Any](
    nargs=1,
    metavar="NAME|MODULE:NAME",
    instance_from_str=lambda words: words[0],
    is_instance=lambda value: True,
    str_from_instance=lambda value: [str(value)],
)
"""How `tyro` reads an option that takes a name, ``module:Name``, or in Python an object."""


def is_reference(text: str) -> bool:
    """Return whether ``text`` has the form ``module:Name``."""
    module, colon, name = text.partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), name))


def load_object(reference: str, argument: str) -> Any:
    """Import the object that ``module:Name`` stands for.

    The module is found as by ``import``: in the current folder, where a command was started with
    ``python -m``, or among the installed packages.

    Arguments:
        reference: such as ``mymodule:Spiral``.
        argument: the option that named it, for the message.

    Raises:
        ValueError: the text has another form, there is no such module, or nothing of this name in
            it.
        ImportError: the module needs another one that is not installed.
    """
    if not is_reference(reference):
        raise ValueError(f"{argument} must have the form module:Name, got {reference!r}")
    module, _, name = reference.partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"{argument}: there is no module {module!r} in the current folder or among the "
            f"installed packages, got {reference!r}"
        ) from error
    if not hasattr(found, name):
        raise ValueError(f"{argument}: the module {module!r} has no {name!r}, got {reference!r}")
    return getattr(found, name)
