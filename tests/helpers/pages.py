"""Pages of documentation as tests see them: blocks of code that run, commands that parse, links."""

import importlib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

import tyro

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Page:
    """A Markdown file of the repository, named by its path from the root."""

    name: str

    @property
    def text(self):
        return (ROOT / self.name).read_text(encoding="utf-8")

    def blocks(self, *languages):
        """The contents of the fenced blocks in one of the languages, unindented."""
        fence = re.compile(r"^( *)```(\w+)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
        return [
            re.sub(rf"^{indent}", "", code, flags=re.MULTILINE)
            for indent, language, code in fence.findall(self.text)
            if language in languages
        ]

    def commands(self):
        """Every shell command, of fenced blocks and of ``python -m`` between backticks."""
        lines = "\n".join(self.blocks("bash", "console")).replace("\\\n", " ").splitlines()
        found = [re.split(r"\s#", line)[0].removeprefix("$ ").strip() for line in lines]
        prose = re.sub(r"^ *```.*?^ *```$", "", self.text, flags=re.DOTALL | re.MULTILINE)
        found += [" ".join(code.split()) for code in re.findall(r"`(python -m [^`]+)`", prose)]
        return [command for command in found if command and "..." not in command]

    def links(self):
        """The targets of links to files of the repository, and of pictures, as (path, heading)."""
        targets = re.findall(r"\]\(([^)\s]+)\)", self.text)
        local = [target for target in targets if not re.match(r"[a-z]+:", target)]
        return [tuple(target.partition("#")[::2]) for target in local]


def run(code, names=None, **changes):
    """Run a block of a page in the names that earlier blocks left, and return these.

    Arguments:
        changes: options to replace, as ``iterations="iterations=3"``: every ``iterations=NUMBER``
            of the block becomes the text given.
    """
    names = {} if names is None else names
    for option, text in changes.items():
        code = re.sub(rf"\b{option}=\d+", text, code)
    exec(code, names)
    return names


def printed_by(code):
    """The lines that a block says it prints: those that follow ``print(...)  #``."""
    return re.findall(r"print\(.*\)  # (.*)$", code, flags=re.MULTILINE)


def parse(command):
    """Parse a command as its program does; programs that are not ours are left alone.

    Raises:
        Exception, SystemExit: the command is not one.
    """
    program, *arguments = [word for word in shlex.split(command) if word != "&&"]
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        for target in (word for word in arguments if "=" not in word):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    elif program == "python" and arguments[0] == "-m":
        _parse_module(arguments[1], arguments[2:])
    elif program == "python":
        assert (ROOT / arguments[0]).is_file(), arguments[0]


def _parse_module(module, arguments):
    if module in ("applications.rl", "applications.toy2d") and arguments:
        program = importlib.import_module(f"{module}.__main__").PROGRAM
        if len(arguments) > 1:
            program.parse(arguments[0], arguments[1:])
        else:  # in prose, a command is named without the options that it requires
            assert arguments[0] in program.commands, arguments[0]
    elif module.startswith("benchmarks."):
        tyro.cli(options_of(module), args=arguments)
    else:
        assert module in ("applications.rl", "pytest", "venv"), module


def options_of(benchmark):
    """The dataclass of a benchmark's options, which its function ``main`` takes."""
    module = importlib.import_module(benchmark)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{benchmark}.__main__")
    hints = get_type_hints(module.main)
    return next(kind for name, kind in hints.items() if name != "return")
