"""The program of docs/rewards_and_guidance.md runs, and prints what the page says it prints."""

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs" / "rewards_and_guidance.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_every_block_runs_and_prints_what_it_says(capsys):
    """As written, but for the numbers of iterations."""
    torch.manual_seed(0)
    names = {}
    for block in BLOCKS:
        few = re.sub(
            r"TiltConfig\(iterations=\d+", "TiltConfig(iterations=3, certificate_samples=64", block
        )
        exec(re.sub(r"TrainerConfig\(iterations=\d+", "TrainerConfig(iterations=3", few), names)
        printed = capsys.readouterr().out.splitlines()
        for expected in re.findall(r"print\(.*\)  # (.*)$", block, flags=re.MULTILINE):
            assert expected in printed
