"""Command line: ``python -m applications.rl COMMAND``; `COMMANDS` names them.

Each command is a dataclass in a module of its own, which is imported only when it is called for, so
that none needs the optional packages of another.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import tyro

from applications.rl.errors import RunError
from applications.rl.renamed import refuse_old_flags
from flows.training import CheckpointError, TrainingDiverged, prepare_process

PROGRAM = "python -m applications.rl"


@dataclass(frozen=True)
class Command:
    """Where a command is found.

    Attributes:
        module: in this package.
        config: its dataclass in there.
        function: called with that.
        summary: what it does, in a few words.
    """

    module: str
    config: str
    function: str
    summary: str

    def load(self) -> tuple[type, Callable[[Any], object]]:
        """Dataclass and function.

        Raises:
            ImportError: a package is missing.
        """
        module = importlib.import_module(f"applications.rl.{self.module}")
        return getattr(module, self.config), getattr(module, self.function)


COMMANDS = {
    "data": Command("data.generate", "DataConfig", "run_data", "make data with scripted experts"),
    "train": Command(
        "training.train", "TrainConfig", "show_train", "train an agent, offline or online"
    ),
    "evaluate": Command(
        "evaluation.command", "EvaluateConfig", "show_evaluate", "play episodes with trained agents"
    ),
    "sweep": Command("sweep", "SweepConfig", "show_sweep", "train many agents, on many machines"),
    "report": Command(
        "report.command", "ReportConfig", "show_report", "draw learning curves and print the table"
    ),
    "export": Command("export", "ExportConfig", "show_export", "write a self-contained policy"),
    "demo": Command("demo", "DemoConfig", "run_demo", "all of it on point maze, in minutes"),
    "list": Command("list_names", "ListConfig", "show_list", "name the tasks, agents and options"),
}


def usage() -> str:
    """The commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND [options]",
            "",
            *lines,
            "",
            f"{PROGRAM} COMMAND --help explains the options of a command.",
        ]
    )


def parse(name: str, arguments: Sequence[str]) -> tuple[Any, Callable[[Any], object]]:
    """The configuration that the options of a command ask for, and the function to give it to.

    The options of an agent depend on its name and its preset, so for `train` these are read first.

    Raises:
        ImportError: a package is missing.
        ValueError: an unknown task, agent or preset, an option of other agents, or an option by a
            name of an earlier version.
    """
    config, function = COMMANDS[name].load()
    refuse_old_flags(arguments)
    program = f"{PROGRAM} {name}"
    if name != "train":
        return tyro.cli(config, args=arguments, prog=program), function
    default = _train_default(config, arguments)
    _check_options(default, arguments)
    return tyro.cli(config, args=arguments, prog=program, default=default), function


def _train_default(config: type, arguments: Sequence[str]) -> Any:
    """A `TrainConfig` with the options of the preset that the arguments name."""
    from applications.rl.agents.presets import preset
    from applications.rl.environments.tasks import find_task

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--task", "--agent", "--preset"):
        first.add_argument(option, nargs="?")
    named = {k: v for k, v in vars(first.parse_known_args(arguments)[0]).items() if v is not None}
    default = config(**{"task": "", **named})
    if "task" not in named:
        example = "pointmaze-medium-navigate-singletask-task1-v0"
        if not {"-h", "--help"} & {*arguments}:
            raise ValueError(f"task: name one, such as --task {example}; `{PROGRAM} list` has all")
        return replace(default, options=preset(default.agent, find_task(example), default.preset))
    return replace(default, options=preset(default.agent, find_task(default.task), default.preset))


def _check_options(default: Any, arguments: Sequence[str]) -> None:
    """Refuse an option that other agents have, and name these.

    Raises:
        ValueError: there is one.
    """
    from applications.rl.agents import AGENTS

    owners: dict[str, list[str]] = {}
    for agent, (config, _) in AGENTS.items():
        for field in fields(config):
            owners.setdefault(field.name, []).append(agent)
    for argument in arguments:
        option = argument.partition("=")[0]
        name = option.removeprefix("--").removeprefix("no-").replace("-", "_")
        agents = owners.get(name, [default.agent])
        if option.startswith("--") and default.agent not in agents:
            raise ValueError(
                f"agent {default.agent!r} has no option {option}; it is one of {', '.join(agents)}"
            )


def describe(error: OSError) -> str:
    """What went wrong and where, without the number of the error."""
    if error.strerror is None:
        return str(error)
    if error.filename is None:
        return error.strerror  # those of `flows.training.checkpoint` name the path
    return f"cannot access {error.filename}: {error.strerror}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; an expected failure is one line on stderr and exit status 1."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        print(f"error: command must be one of {', '.join(COMMANDS)}, got {name!r}", file=sys.stderr)
        return 2
    config = None
    try:
        config, function = parse(name, rest)
        function(config)
    except OSError as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        hint = "pip install 'adjoint-matching[rl]'"
        print(f"error: the package {error.name!r} is not installed: {hint}", file=sys.stderr)
        return 1
    except (ValueError, ImportError, RunError, CheckpointError, TrainingDiverged) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        flag = " with --resume" if hasattr(config, "resume") else ""
        hint = f"; the same command{flag} continues" if flag or name == "sweep" else ""
        print(f"\ninterrupted{hint}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
