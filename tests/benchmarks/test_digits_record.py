"""What the README says of the digits is what the record holds."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
RESULTS = ROOT / "benchmarks" / "results"


def rows(name, law):
    found = [r for r in json.loads((RESULTS / name).read_text()) if r["law"] == law]
    assert [r["temperature"] for r in found] == [1.0, 2.0, 4.0]
    return found


def within(name, law):
    return sum(r["within"] for r in rows(name, law))


def distances(name, law):
    tvs = [f"{r['class_tv']:.3f}".lstrip("0") for r in rows(name, law)]
    return f"{min(tvs)} to {max(tvs)}"


@pytest.mark.parametrize(
    "said",
    [
        f"for {within('digits.json', 'chain')} of 30 classes",
        f"total variation {distances('digits.json', 'chain')}",
        f"draws, {within('digits.json', 'weighted')} of 30",
        f"base's ODE, {within('digits.json', 'ode')} of 30 ({distances('digits.json', 'ode')})",
        f"{within('digits_plain.json', 'chain')} of 30 ({distances('digits_plain.json', 'chain')})",
        "{iterations} updates of {batch_size} trajectories".format(**rows("digits.json", "ode")[0]),
    ],
)
def test_the_readme_quotes_the_record(said):
    assert said in README
