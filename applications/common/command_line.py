"""Command lines: one program of several commands, each a dataclass and a function.

The dataclass of a command is parsed by `tyro`, its docstrings are the help.  Modules are imported
only when their command is called for, so that none needs the optional packages of another.  An
expected failure is one line on the standard error stream, and so is a warning.
"""

from __future__ import annotations

import importlib
import os
import select
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import tyro
from tqdm import tqdm

from applications.common.errors import EXPECTED, describe
from flows.training.checkpoint import PACKAGE
from flows.training.renamed import refuse_old_flags


@dataclass(frozen=True)
class Command:
    """A command is a configuration and the function that is called with it.

    Attributes:
        module: full name of the module that holds both.
        config: name of the dataclass.
        function: name of the function.
        summary: the purpose of the command, in a few words.
        default: callable (dataclass, arguments) -> the configuration whose values hold where no
            option is given; by default the defaults of the dataclass.
        continues: whether the same command, without another option, continues an interrupted one.
    """

    module: str
    config: str
    function: str
    summary: str
    default: Callable[[type, Sequence[str]], Any] | None = None
    continues: bool = False

    def load(self) -> tuple[type, Callable[[Any], object]]:
        """Import the dataclass and the function.

        Raises:
            ImportError: a package is missing.
        """
        module = importlib.import_module(self.module)
        return getattr(module, self.config), getattr(module, self.function)


@dataclass(frozen=True)
class Program:
    """A program is a set of commands.

    Attributes:
        name: words that start it, such as ``python -m applications.rl``.
        commands: the commands by name.
        extra: extra of this package that installs the optional packages of the program.
    """

    name: str
    commands: Mapping[str, Command]
    extra: str = ""

    def usage(self) -> str:
        """List the commands, a line each."""
        width = max(map(len, self.commands))
        lines = [f"  {name:<{width}}  {c.summary}" for name, c in self.commands.items()]
        return "\n".join(
            [
                f"usage: {self.name} COMMAND [options]",
                "",
                *lines,
                "",
                f"{self.name} COMMAND --help explains the options of a command.",
            ]
        )

    def parse(self, name: str, arguments: Sequence[str]) -> tuple[Any, Callable[[Any], object]]:
        """Return the configuration that ``arguments`` ask for, and the function to call with it.

        Raises:
            ImportError: a package is missing.
            ValueError: a value is out of range, or an option has another name by now.
        """
        command = self.commands[name]
        config, function = command.load()
        refuse_old_flags(arguments, getattr(config, "renamed", {}))
        program = f"{self.name} {name}"
        if command.default is None:
            return tyro.cli(config, args=arguments, prog=program), function
        default = command.default(config, arguments)
        return tyro.cli(config, args=arguments, prog=program, default=default), function

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Parse ``arguments`` (``sys.argv`` by default), run, and return the exit status.

        The status is 1 after an expected failure, 2 after a wrong command, 130 after Ctrl-C, and
        141 where the reader of the output has gone, as ``head`` does.
        """
        try:
            try:
                return self._run(sys.argv[1:] if arguments is None else list(arguments))
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())  # else Python complains when it closes the stream
            os.close(nowhere)
            return 141

    def _run(self, arguments: list[str]) -> int:
        """Parse and run; return the exit status."""
        if not arguments or arguments[0] in ("-h", "--help"):
            print(self.usage())
            return 0 if arguments else 2
        name, rest = arguments[0], arguments[1:]
        if name not in self.commands:
            known = ", ".join(self.commands)
            print(f"error: command must be one of {known}, got {name!r}", file=sys.stderr)
            return 2
        config = None
        try:
            with warnings.catch_warnings():
                warnings.showwarning = show_warning
                config, function = self.parse(name, rest)
                function(config)
        except ModuleNotFoundError as error:
            extra = f"[{self.extra}]" if self.extra else ""
            hint = f"pip install '{PACKAGE}{extra}'"
            print(f"error: the package {error.name!r} is not installed: {hint}", file=sys.stderr)
            return 1
        except EXPECTED as error:
            if isinstance(error, BrokenPipeError) and _reader_gone():
                raise
            print(f"error: {describe(error)}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(f"\ninterrupted{_advice(self.commands[name], config)}", file=sys.stderr)
            return 130
        return 0


def _reader_gone() -> bool:
    """Tell whether nobody reads the standard output any more."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _advice(command: Command, config: Any) -> str:
    """Say how an interrupted command is continued, if it can be."""
    if command.continues:
        return "; the same command continues"
    if not hasattr(config, "resume"):
        return ""
    instead = " instead of --overwrite" if getattr(config, "overwrite", False) else ""
    return f"; the same command with --resume{instead} continues"


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Show a warning as one line, without its place, and leave progress bars as they are."""
    tqdm.write(f"warning: {' '.join(str(message).split())}", file=sys.stderr)
