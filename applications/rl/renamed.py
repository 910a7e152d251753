"""Options that had another name in an earlier version, so that an old command says what to write.

`applications.rl.__main__` refuses the old names on every command line, and `TrainConfig` refuses
them as arguments in Python.
"""

from __future__ import annotations

from collections.abc import Iterable

RENAMED = {
    "eval_beside": "background_eval",
    "together": "stacked",
    "graph": "cuda_graphs",
    "slow_rate": "target_rate",
    "slow_gradient": "target_gradient",
    "slow_base": "target_behaviour",
}
"""New name of an option by its old name."""


def refuse_old_flags(arguments: Iterable[str]) -> None:
    """Refuse flags of a command line that have another name by now.

    Raises:
        ValueError: there is one; the message has its new name.
    """
    for argument in arguments:
        flag = argument.partition("=")[0]
        name = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
        if flag.startswith("--") and name in RENAMED:
            new = RENAMED[name].replace("_", "-")
            raise ValueError(f"the option {flag} was renamed to --{new}")


def refuse_old_arguments(owner: str, names: Iterable[str]) -> None:
    """Refuse keyword arguments of ``owner`` that have another name by now.

    Raises:
        TypeError: there is one; the message has its new name.
    """
    for name in names:
        if name in RENAMED:
            raise TypeError(f"{owner}: the argument {name!r} was renamed to {RENAMED[name]!r}")
