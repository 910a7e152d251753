"""The tables of docs/exactness.md are those of the records."""

import json

import pytest
from helpers.pages import ROOT, Page

PAGE = Page("docs/exactness.md")
SCHEMES = {
    "euler_published": "`euler_published`",
    "euler_consistent": "`euler_consistent`",
    "ancestral_pair": "`ancestral_pair`",
    "moment_matched": "`moment_matched`",
    "moment_matched_weighted": "`moment_matched`, weighted",
    "moment_matched_log_variance": "`moment_matched`, variance of log w",
    "covariance_matched": "`covariance_matched`",
    "covariance_matched_weighted": "`covariance_matched`, weighted",
    "covariance_matched_log_variance": "`covariance_matched`, variance of log w",
}
CHAINS = ("moment_matched", "covariance_matched")


def record(name):
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))


def digits(value):
    """Three digits, without the zero before the point."""
    text = f"{value:.3f}"
    return text[1:] if text.startswith("0") else text.replace("-0.", "-.")


def line(label, rows, first, second):
    cells = (f"{digits(row[first])} ({digits(row[second])})" for row in rows)
    return f"| {label} | " + " | ".join(cells) + " |"


def lines_of(problem):
    """The lines of a problem's table."""
    rows = [row for row in record("fixed_points.json") if row["problem"] == problem]
    for scheme, label in SCHEMES.items():
        own = [row for row in rows if row["scheme"] == scheme]
        yield line(label, own, "mode_weight", "velocity_error")
    if problem == "R":
        for kernel in CHAINS:
            own = [row for row in rows if row["scheme"] == kernel]
            yield line(f"`{kernel}`, base chain", own, "chain_mode_weight", "chain_log_z_error")


def noise_lines():
    """The lines of the table of noise."""
    for row in record("adjoint_noise.json")["start"]:
        numbers = [row[key] for key in ("adjoint_mean", "adjoint_median", "log_variance")]
        mean, median, variance = (f"{float(f'{number:.3g}'):g}" for number in numbers)
        share = f"{100 * row['largest_share']:.2g} %"
        yield f"| {row['problem']} | {mean} | {median} | {share} | {variance} |"


@pytest.mark.parametrize("problem", ["D", "R"])
def test_the_tables_of_fixed_points_are_those_of_the_record(problem):
    assert [text for text in lines_of(problem) if text not in PAGE.text] == []


def test_the_table_of_noise_is_that_of_the_record():
    assert [text for text in noise_lines() if text not in PAGE.text] == []


def test_the_numbers_in_the_text_are_those_of_the_record():
    rows = {(r["problem"], r["scheme"], r["steps"]): r for r in record("fixed_points.json")}
    narrow, rare = (rows[problem, "moment_matched", 20] for problem in "DR")
    assert f"gives the right mode {digits(narrow['exact_mode_weight'])}" in PAGE.text
    assert f"the right mode to {digits(rare['exact_mode_weight'])}" in PAGE.text
    assert f"has {digits(narrow['chain_mode_weight'])} at K = 20" in PAGE.text
    error = {k: rows["R", k, 40]["chain_log_z_error"] for k in CHAINS}
    assert error["covariance_matched"] / error["moment_matched"] == pytest.approx(0.2, abs=0.03)


def default_lines():
    """The lines of the table of the call without options: the worst over seeds of each problem."""
    problems = {}
    for row in record("tilt_default.json"):
        if row["method"] == "default" and not row["failure"]:
            problems.setdefault(row["problem"], []).append(row)
    for name, rows in problems.items():
        worst = [
            digits(max(row[column] for row in rows))
            for column in ("mode_tv", "velocity_error", "w2_ratio")
        ]
        off = max(abs(row["log_z_error"]) for row in rows)
        spread = digits(max(row["log_weight_std"] for row in rows))
        numbers = " | ".join([*worst, f"{off:.1f}", spread])
        yield f"| {name} | {rows[0]['dim']} | {len(rows)} | {numbers} |"


def test_the_table_of_the_call_without_options_is_that_of_the_record():
    assert [text for text in default_lines() if text not in PAGE.text] == []
