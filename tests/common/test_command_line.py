"""Programs of several commands: what they print, how they fail, and what they say of old names."""

import errno
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from applications.common.command_line import Command, Program


@dataclass(frozen=True)
class Config:
    """Count sheep."""

    renamed: ClassVar = {"goats": "sheep"}
    sheep: int = 3
    """Number of sheep."""
    resume: bool = False
    """Go on counting."""
    overwrite: bool = False
    """Count anew."""

    def __post_init__(self):
        if self.sheep < 0:
            raise ValueError(f"sheep must be at least 0, got {self.sheep}")


RUNS = []


def count(config):
    RUNS.append(config)
    if config.sheep == 13:
        raise KeyboardInterrupt
    if config.sheep == 14:
        raise FileNotFoundError(2, "No such file or directory", "meadow")
    if config.sheep == 15:
        raise ModuleNotFoundError("no module", name="wool")
    if config.sheep == 16:
        warnings.warn("they\nmove", stacklevel=1)
    if config.sheep == 17:
        raise AssertionError("a bug")
    if config.sheep == 18:
        print("sheep " * 10_000)
    if config.sheep == 19:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def eleven(config, arguments):
    return config(sheep=11)


def program(**options) -> Program:
    commands = {
        "count": Command(__name__, "Config", "count", "count sheep"),
        "eleven": Command(__name__, "Config", "count", "count eleven", default=eleven),
        "sweep": Command(__name__, "Config", "count", "count all", continues=True),
    }
    return Program("sheep", commands, **options)


@pytest.fixture(autouse=True)
def no_runs():
    RUNS.clear()


def test_a_command_runs_with_what_was_parsed():
    assert program().main(["count", "--sheep", "5"]) == 0
    assert program().main(["eleven"]) == 0
    assert [config.sheep for config in RUNS] == [5, 11]


def test_usage_lists_the_commands(capsys):
    assert program().main(["--help"]) == 0
    assert program().main([]) == 2
    assert capsys.readouterr().out.count("  count   count sheep\n") == 2
    assert program().main(["shear"]) == 2
    assert capsys.readouterr().err == (
        "error: command must be one of count, eleven, sweep, got 'shear'\n"
    )


@pytest.mark.parametrize(
    ("arguments", "status", "shown"),
    [
        (["count", "--sheep", "14"], 1, "error: cannot access meadow: No such file or directory\n"),
        (
            ["count", "--sheep", "15"],
            1,
            "error: the package 'wool' is not installed: pip install 'adjoint-matching[farm]'\n",
        ),
        (["count", "--sheep", "16"], 0, "warning: they move\n"),
        (["count", "--goats", "2"], 1, "error: the option --goats was renamed to --sheep\n"),
        (
            ["count", "--sheep", "13"],
            130,
            "\ninterrupted; the same command with --resume continues\n",
        ),
        (
            ["count", "--sheep", "13", "--overwrite"],
            130,
            "\ninterrupted; the same command with --resume instead of --overwrite continues\n",
        ),
        (["sweep", "--sheep", "13"], 130, "\ninterrupted; the same command continues\n"),
    ],
)
def test_what_happens_is_one_line(capsys, arguments, status, shown):
    before = warnings.showwarning
    assert program(extra="farm").main(arguments) == status
    assert capsys.readouterr().err == shown
    assert warnings.showwarning is before


def test_a_bug_keeps_its_traceback():
    with pytest.raises(AssertionError, match="a bug"):
        program().main(["count", "--sheep", "17"])


READER = """
import sys
sys.path[:0] = {paths!r}
from common.test_command_line import program
sys.exit(program().main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "arguments", [["count", "--sheep", "18"], ["count", "--help"], ["--help"]], ids=" ".join
)
def test_a_reader_that_has_gone_ends_a_command_without_a_word(arguments, unbuffered):
    """As ``| head`` does: the pipe is closed before the command writes."""
    reads, writes = os.pipe()
    os.close(reads)
    code = READER.format(paths=[str(Path(__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        check=False,
        stdout=writes,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    os.close(writes)
    assert (done.stderr, done.returncode) == ("", 141)


def test_a_pipe_of_another_kind_is_an_error_of_its_own(capfd):
    assert program().main(["count", "--sheep", "19"]) == 1
    assert capfd.readouterr().err == "error: Broken pipe\n"
