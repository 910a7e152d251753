"""The options of a tilt have a page made from their docstrings; this file, run, writes it."""

import ast
import inspect
import sys
import textwrap
from dataclasses import fields
from pathlib import Path

from adjoint import TiltConfig

PAGE = Path(__file__).parents[2] / "docs" / "tilt_options.md"

INTRODUCTION = """\
# The options of a tilt

`tilt(..., config=TiltConfig(steps=40, refine_fraction=0.5))`. Every option has a default, and a
wrong value is refused when the configuration is made. K is the number of steps of the chain, B the
number of trajectories of an update, T the temperature, w the importance weight of a trajectory.

This page is written by `python tests/docs/test_tilt_options.py` from `adjoint/config.py` and
`flows/training/config.py`. What limits the gradient of a reward is an option of `Reward`
([Rewards and guidance](rewards_and_guidance.md)); what a big model needs is in
[Large models](large_models.md).
"""

GROUPS = {
    "The target and the chain": ("temperature", "kernel", "steps", "shift"),
    "The updates": ("iterations", "batch_size", "accumulate", "seed"),
    "The loss": (
        *("importance", "min_ess", "control_variates"),
        *("late_fraction", "early_fraction", "clip", "clip_quantile"),
        *("replay_size", "losses_per_rollout"),
    ),
    "The refinement": (
        *("refine_fraction", "refine_loss", "refine_steps", "refine_kernel", "refine_samples"),
    ),
    "The optimiser": (*("lr", "lr_schedule", "warmup", "weight_decay", "grad_clip", "ema_decay"),),
    "Before and after training": ("base_samples", "certificate_samples"),
    "Memory and speed": (
        *("eval_batch_size", "micro_batch", "reward_batch", "offload", "autocast", "compile"),
        *("cuda_graphs", "checkpoint_every"),
    ),
}
"""The options of each table, in its order."""


def docstrings(config: type) -> dict[str, str]:
    """Return the texts below the fields of a dataclass and of its bases, by field."""
    found: dict[str, str] = {}
    for base in reversed(config.__mro__[:-1]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        for field, text in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[field.target.id] = " ".join(text.value.value.split())
    return found


def cell(value: object) -> str:
    """Return a default as the pages of the agents write it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None:
        return "chosen"
    return f"`{value}`" if isinstance(value, str) else f"{value:g}"


def page() -> str:
    """Return the page."""
    options = {field.name: field for field in fields(TiltConfig)}
    texts = docstrings(TiltConfig)
    free = [f"`{name}`" for name, f in options.items() if f.metadata.get("resume") == "free"]
    parts = [INTRODUCTION]
    for title, names in GROUPS.items():
        rows = [
            f"| `{name}` | {cell(options[name].default)} | "
            f"{texts[name].rstrip('.').replace('``', '`').replace('|', chr(92) + '|')} |"
            for name in names
        ]
        parts.append(
            "\n".join(
                [f"## {title}", "", "| option | default | meaning |", "|---|---|---|", *rows, ""]
            )
        )
    parts.append(
        "## A resume\n\n"
        f"A resumed run may change {', '.join(free[:-1])} and {free[-1]}.\n"
        "Every other option must be that of the checkpoint.\n"
    )
    return "\n".join(parts)


def test_the_page_is_that_of_the_docstrings():
    assert PAGE.read_text(encoding="utf-8") == page(), f"python {Path(__file__).name} writes it"


def test_every_option_is_in_one_table():
    listed = [name for names in GROUPS.values() for name in names]
    assert sorted(listed) == sorted(field.name for field in fields(TiltConfig))


def test_every_option_has_a_text_of_its_own():
    texts = docstrings(TiltConfig)
    assert all(texts[field.name] for field in fields(TiltConfig))
    assert len(set(texts.values())) == len(texts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"wrote {PAGE}\n")
