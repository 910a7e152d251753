"""Command line: ``python -m applications.rl COMMAND``; `PROGRAM` names the commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from applications.common.command_line import Command, Program
from flows.training import prepare_process

NAME = "python -m applications.rl"


def train_default(config: type, arguments: Sequence[str]) -> Any:
    """Return a `TrainConfig` with the options of the agent and preset that ``arguments`` name.

    The options of an agent depend on its name and its preset, so these are read first.

    Raises:
        ValueError: an unknown task, agent or preset, or an option that only other agents have.
    """
    default = _preset_default(config, arguments)
    _check_options(default, arguments)
    return default


def _preset_default(config: type, arguments: Sequence[str]) -> Any:
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
            raise ValueError(f"task: name one, such as --task {example}; `{NAME} list` has all")
        return replace(default, options=preset(default.agent, find_task(example), default.preset))
    return replace(default, options=preset(default.agent, find_task(default.task), default.preset))


def _check_options(default: Any, arguments: Sequence[str]) -> None:
    """Refuse an option that only other agents have, and name these.

    Raises:
        ValueError: there is one.
    """
    from applications.rl.agents import AGENTS

    owners: dict[str, list[str]] = {}
    for name, agent in AGENTS.items():
        for field in fields(agent.config_class):
            owners.setdefault(field.name, []).append(name)
    own = {field.name for field in fields(default.options)}
    for argument in arguments:
        option = argument.partition("=")[0]
        name = option.removeprefix("--").removeprefix("no-").replace("-", "_")
        agents = owners.get(name, [default.agent])
        if option.startswith("--") and name not in own and default.agent not in agents:
            raise ValueError(
                f"agent {default.agent!r} has no option {option}; it is one of {', '.join(agents)}"
            )


def _command(module: str, config: str, function: str, summary: str, **options: Any) -> Command:
    return Command(f"applications.rl.{module}", config, function, summary, **options)


COMMANDS = {
    "data": _command("data.generate", "DataConfig", "run_data", "make data with scripted experts"),
    "train": _command(
        "training.train",
        "TrainConfig",
        "show_train",
        "train an agent, offline or online",
        default=train_default,
    ),
    "evaluate": _command(
        "evaluation.command",
        "EvaluateConfig",
        "show_evaluate",
        "play episodes with trained agents",
    ),
    "sweep": _command(
        "sweep",
        "SweepConfig",
        "show_sweep",
        "train many agents, on many machines",
        continues=True,
    ),
    "report": _command(
        "report.command",
        "ReportConfig",
        "show_report",
        "draw learning curves and print the table",
    ),
    "export": _command("export", "ExportConfig", "show_export", "write a self-contained policy"),
    "demo": _command("demo", "DemoConfig", "run_demo", "all of it on point maze, in minutes"),
    "list": _command("list_names", "ListConfig", "show_list", "name the tasks, agents and options"),
}

PROGRAM = Program(NAME, COMMANDS, extra="rl")
main, parse = PROGRAM.main, PROGRAM.parse

if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
