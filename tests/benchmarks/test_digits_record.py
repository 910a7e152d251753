"""The README and the page on rewards quote the records of the digits."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
RESULTS = ROOT / "benchmarks" / "results"


def rows(name, kind):
    found = [r for r in json.loads((RESULTS / name).read_text()) if r["kind"] == kind]
    assert [r["temperature"] for r in found] == [1.0, 2.0, 4.0]
    return found


def within(name, kind):
    return sum(r["within"] for r in rows(name, kind))


def accepted(name):
    first, second, third = (f"{100 * r['acceptance']:.0f}" for r in rows(name, "accepted"))
    return f"{first}, {second} and {third}"


def distances(name, kind):
    tvs = [f"{r['class_tv']:.3f}".lstrip("0") for r in rows(name, kind)]
    return f"{min(tvs)} to {max(tvs)}"


@pytest.mark.parametrize(
    "said",
    [
        f"base samples for {within('digits.json', 'accepted')} of 30 classes",
        f"`certificate.resample` draws, for {within('digits.json', 'weighted')} of 30 classes",
        f"it accepts {accepted('digits.json')} % of the trajectories",
        f"total variation of {distances('digits.json', 'chain')}, and "
        f"{within('digits.json', 'chain')} of 30 classes",
        f"of the ODE within {distances('digits.json', 'ode')}",
    ],
)
def test_the_readme_quotes_the_record(said):
    assert said in README


def test_the_page_quotes_the_record_of_the_model_that_sees_the_reward():
    page = (ROOT / "docs" / "rewards_and_guidance.md").read_text(encoding="utf-8")
    ess = {
        name: [f"{row['ess']:.2f}".lstrip("0") for row in rows(name, "chain")]
        for name in ("digits_informed.json", "digits.json")
    }
    told, plain = ("{}, {} and {}".format(*found) for found in ess.values())
    said = f"({told} at temperatures 1, 2 and 4, against {plain})"
    assert said in " ".join(page.split())
    new, old = (rows(name, "chain")[0] for name in ess)
    trained = [row["iterations"] * row["batch_size"] for row in (new, old)]
    assert 4 * trained[0] == trained[1]
    assert new["class_tv"] > old["class_tv"]
