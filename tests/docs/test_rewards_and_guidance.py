"""The program of docs/rewards_and_guidance.md runs, and prints what the page says it prints."""

import re

import pytest
import torch
from helpers.pages import Page, printed_by, run


@pytest.mark.slow
def test_every_block_runs_and_prints_what_it_says(capsys):
    """As written, but for the numbers of iterations."""
    torch.manual_seed(0)
    names = {}
    for block in Page("docs/rewards_and_guidance.md").blocks("python"):
        few = re.sub(r"TiltConfig\(", "TiltConfig(certificate_samples=64, ", block)
        run(few, names, iterations="iterations=3")
        assert set(printed_by(block)) <= set(capsys.readouterr().out.splitlines())
