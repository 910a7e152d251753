"""The program of docs/large_models.md runs, and its numbers are those of the benchmark."""

import json
import re

import pytest
import torch
from helpers.pages import ROOT, Page, printed_by, run

from adjoint.config import TiltConfig

PAGE = Page("docs/large_models.md").text
ROWS = json.loads((ROOT / "benchmarks" / "results" / "memory.json").read_text())


@pytest.mark.slow
def test_every_block_runs_and_prints_what_it_says(capsys, tmp_path, monkeypatch):
    """As written, but for the numbers of iterations and samples."""
    pytest.importorskip("peft", reason="low-rank adapters need the package peft (extra lora)")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    for block in Page("docs/large_models.md").blocks("python"):
        run(block, names, iterations="iterations=3, certificate_samples=64, base_samples=64")
        assert set(printed_by(block)) <= set(capsys.readouterr().out.splitlines())
    assert (tmp_path / "adapters.safetensors").exists()


def test_the_numbers_are_those_of_the_benchmark():
    mb = {row["name"]: row["peak_mb"] for row in ROWS}
    update = round(mb["update"])
    shown = {
        f"{round(mb['all weights trained'])} → {round(mb['adapters of rank 8 trained'])} MB",
        f"checkpoint {round(mb['checkpoint, all weights trained'])} → "
        f"{round(mb['checkpoint, adapters of rank 8 trained'])} MB",
        f"{update} → {mb['micro_batch=8']:.1f} MB",
        f"{update} → {round(mb['late_fraction=0.25, early_fraction=0.25'])} MB",
        f"{update} → {round(mb['batch_size=2, accumulate=4'])} MB",
        f"{update} → {round(mb['blocks of the model checkpointed'])} MB",
        f"{update} → {round(mb['autocast'])} MB",
        f"`micro_batch=8` {mb['micro_batch=8, autocast']:.1f}",
        f"{mb['batch_size=32, micro_batch=8']:.1f} → "
        f"{mb['batch_size=32, micro_batch=8, offload']:.1f} MB",
    }
    assert [text for text in shown if text not in PAGE] == []
    adjoint = {row["steps"]: row["peak_mb"] for row in ROWS if row["name"] == "adjoint pass"}
    assert adjoint.keys() == {10, 40, 160}
    assert {f"{peak:.1f}" for peak in adjoint.values()} == {"4.5"}
    assert "peaks at 4.5 MB for K = 10, 40 and 160" in PAGE


def test_options_of_the_page_exist():
    options = set(TiltConfig.__dataclass_fields__)
    for name in re.findall(r"`(\w+)=", PAGE):
        assert name in options | {"assign", "use_reentrant"}, name
