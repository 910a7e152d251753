"""Reports: what is read, what it is compared with, and what is drawn and printed."""

import csv
import json
import math

import matplotlib
import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from PIL import Image

from applications.common.pictures import style
from applications.rl import AGENTS, ReportConfig, run_report
from applications.rl.evaluation.statistics import bootstrap_interval, wilson_interval
from applications.rl.report.command import show_report
from applications.rl.report.groups import grouped
from applications.rl.report.learning_curves import Curve, colors, counted, learning_curves, spread
from applications.rl.report.published import PUBLISHED, published_curves, published_name
from applications.rl.report.results import read_results
from applications.rl.report.table import format_table

CUBE = "cube-double-play-singletask-task1-v0"
MAZE = "pointmaze-medium-navigate-singletask-task1-v0"
HEADER = "step,phase,success,episodes,return,length\n"


def write_run(
    folder, agent="qam", task=CUBE, seed=0, rates=None, online=None, value=-1.5, **config
):
    """A run folder whose rates are given by step."""
    folder.mkdir(parents=True, exist_ok=True)
    known = {"agent": agent, "task": task, "seed": seed, "preset": "small", "versions": {"t": "1"}}
    (folder / "config.json").write_text(json.dumps(known | config))
    lines = [f"{step},offline,{r},50,{value},80\n" for step, r in (rates or {}).items()]
    lines += [f"{step},online,{r},50,{value},80\n" for step, r in (online or {}).items()]
    (folder / "evaluation.csv").write_text(HEADER + "".join(lines))
    return folder


def config(tmp_path, *runs, **options) -> ReportConfig:
    return ReportConfig(tuple(map(str, runs)), folder=tmp_path / "report", **options)


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def texts(figure):
    return " | ".join(t.get_text() for t in figure.findobj(matplotlib.text.Text))


def dashed(figure):
    """Lines of published curves; that between the phases is dotted, but upright."""
    lines = [line for line in figure.axes[0].lines if line.is_dashed()]
    return [line for line in lines if line.get_xdata()[0] != line.get_xdata()[-1]]


# --- published curves ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "percents"),
    [
        ("QAM-E", (7.9, 19.8, 40.4, 45.7, 84.7)),
        ("QAM-F", (7.0, 13.7, 39.2, 45.4, 81.7)),
        ("QAM", (7.8, 15.9, 39.1, 44.4, 69.8)),
        ("FQL", (3.2, 9.0, 32.8, 35.7, 82.5)),
    ],
)
def test_published_averages_are_those_of_the_paper(method, percents):
    curve = published_curves("all")[method]
    places = [list(curve.steps).index(1000 * k) for k in (50, 100, 500, 1000, 1500)]
    assert 100 * curve.mean[places] == pytest.approx(percents, abs=0.06)


def test_all_methods_are_known():
    assert {*published_curves("all")} == {*PUBLISHED}


def test_every_task_has_the_six_methods_over_the_whole_run():
    for task in ("antmaze-giant-navigate-singletask-task5-v0", CUBE, "humanoidmaze-large-navigate"):
        curves = published_curves(task)
        assert {*curves} == {"QAM", "QAM-E", "QAM-F", "BAM", "FQL", "ReBRAC"}
        for curve in curves.values():
            assert list(curve.steps) == list(range(50_000, 1_500_001, 50_000))
            assert (curve.low <= curve.mean + 1e-4).all()
            assert (curve.mean <= curve.high + 1e-4).all()


@pytest.mark.parametrize(
    ("task", "name"),
    [
        (CUBE, CUBE),
        ("cube-double-play-singletask-v0", "cube-double-play-singletask-task2-v0"),
        ("scene-sparse-play-singletask-task1-v0", "scene-play-singletask-task1-v0"),
        ("scene-play-singletask-task1-v0", ""),
        ("puzzle-3x3-play-singletask-v0", ""),
        ("puzzle-3x3-sparse-play-singletask-v0", "puzzle-3x3-play-singletask-task4-v0"),
        ("cube-double-sparse-play-singletask-task1-v0", ""),
        ("scene-play", "scene-play"),
    ],
)
def test_runs_are_compared_with_published_runs_with_the_same_reward_only(task, name):
    assert published_name(task) == name
    assert bool(published_curves(task)) == bool(name)


def test_a_task_that_was_not_published_has_no_curves():
    assert published_curves(MAZE) == {}
    assert published_curves("nonsense") == {}


# --- reading -------------------------------------------------------------------------------------


def test_folders_at_any_depth_and_wildcards_find_every_run_once(tmp_path):
    for seed in range(3):
        write_run(tmp_path / "runs" / f"a{seed}" / "deep", seed=seed, rates={10: 0.2})
    (tmp_path / "runs" / "other").mkdir()
    found = read_results([str(tmp_path / "runs"), str(tmp_path / "runs" / "a*")])
    assert sorted(r.settings["seed"] for r in found) == [0, 1, 2]
    assert len(read_results([str(tmp_path / "runs" / "a[01]")])) == 2


def test_rows_of_a_json_file_are_runs_like_folders(tmp_path):
    rows = [
        {
            "task": MAZE,
            "agent": agent,
            "seed": seed,
            "step": step,
            "phase": "offline",
            "success": rate + seed / 10,
            "episodes": 20,
            "hours": 0.1 * step,
            "device": "cpu",
            "preset": "small",
        }
        for agent, rate in (("bc", 0.0), ("qam", 0.7))
        for seed in range(2)
        for step in (100, 200)
    ]
    (tmp_path / "rl.json").write_text(json.dumps(rows))
    groups, remarks = grouped(read_results([str(tmp_path / "rl.json")]))
    assert [(g.label, g.seeds, list(g.steps)) for g in groups] == [
        ("bc", (0, 1), [100, 200]),
        ("qam", (0, 1), [100, 200]),
    ]
    assert groups[1].success == pytest.approx(np.array([[0.7, 0.7], [0.8, 0.8]]))
    assert remarks == []


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    folder = write_run(tmp_path / "a", rates={10: 0.2, 20: 0.4})
    with (folder / "evaluation.csv").open("a") as file:
        file.write("30,offline,0.")
    (result,) = read_results([str(folder)])
    assert result.rates == {(10, 0): (0.2, 50), (20, 0): (0.4, 50)}


@pytest.mark.slow
def test_seeds_are_compared_where_all_of_them_are(tmp_path):
    write_run(tmp_path / "a", seed=0, rates={10: 0.2, 20: 0.4, 30: 1.0})
    write_run(tmp_path / "b", seed=1, rates={10: 0.4, 20: 0.6})
    report = run_report(config(tmp_path, tmp_path / "?"))
    (line,) = report.lines
    assert (line.step, line.seeds, line.mean) == (20, 2, 0.5)
    assert report.remarks == (
        f"qam on {CUBE}: 2 of 3 evaluations shown, behind which seeds [1] are",
    )


def test_runs_without_evaluations_are_named(tmp_path):
    write_run(tmp_path / "runs" / "a", rates={10: 0.2})
    begun = write_run(tmp_path / "runs" / "b", seed=1)
    never = write_run(tmp_path / "runs" / "c", seed=0)
    (never / "evaluation.csv").unlink()
    for name, content in (("other", '{"seed": 0}'), ("broken", "{")):
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "config.json").write_text(content)
    report = run_report(config(tmp_path, tmp_path / "runs"))
    assert report.remarks == (f"left out, without evaluations: {begun}, {never}",)
    assert [line.seeds for line in report.lines] == [1]


@pytest.mark.slow
def test_settings_tell_curves_apart_when_asked_to(tmp_path):
    for tau in (1.0, 10.0):
        for seed in range(2):
            options = {"inverse_temperature": tau, "hidden": [8, 8]}
            folder = tmp_path / f"{tau}-{seed}"
            write_run(folder, seed=seed, rates={10: tau / 20}, options=options)
    with pytest.raises(ValueError, match=r"seed 0, .* they differ in options.inverse_temperature:"):
        run_report(config(tmp_path, tmp_path))
    by = ("agent", "options.inverse_temperature")
    report = run_report(config(tmp_path, tmp_path, by=by))
    assert [(line.agent, line.mean) for line in report.lines] == [
        ("qam inverse_temperature=1.0", 0.05),
        ("qam inverse_temperature=10.0", 0.5),
    ]
    with pytest.raises(ValueError, match=r"by: .* has no setting 'tau'; it has agent, options.hid"):
        run_report(config(tmp_path, tmp_path, by=("tau",)))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            "10,offline,1.5,50,0,0",
            r"evaluation.csv, line 2: success must be a rate in \[0, 1\], go",
        ),
        ("10,offline,nan,50,0,0", "line 2: success must be a rate"),
        ("10,offline,,50,0,0", "line 2: success must be a number, got ''"),
        ("10,offline", "line 2: success must be a number, got None"),
        ("ten,offline,0.5,50,0,0", "line 2: step must be a number, got 'ten'"),
        ("-1,offline,0.5,50,0,0", "line 2: step must be a whole number >= 0, got '-1'"),
        ("1.5,offline,0.5,50,0,0", "line 2: step must be a whole number >= 0, got '1.5'"),
        ("inf,offline,0.5,50,0,0", "line 2: step must be a whole number >= 0, got 'inf'"),
        ("10,training,0.5,50,0,0", "line 2: phase must be offline or online, got 'training'"),
        ("10,offline,0.5,0,0,0", "line 2: episodes must be a whole number >= 1, got '0'"),
        ("10,offline,0.5,50,much,0", "line 2: return must be a number, got 'much'"),
    ],
)
def test_a_malformed_evaluation_is_one_clear_line(tmp_path, row, message):
    folder = write_run(tmp_path / "a")
    (folder / "evaluation.csv").write_text(HEADER + row + "\n")
    with pytest.raises(ValueError, match=message) as caught:
        run_report(config(tmp_path, folder))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("evaluation.csv", "a,b\n1,2\n", "must have the columns step, phase, success, episodes"),
        ("config.json", "{", "config.json is not JSON"),
        ("config.json", "[]", "config.json must hold an object, got a list"),
        ("config.json", '{"agent": "qam", "seed": 0}', "'task' is missing"),
        ("config.json", '{"agent": "qam", "task": "t", "seed": "0"}', "seed must be an integer"),
        ("evaluation.csv", HEADER, "none of 1 runs has an evaluation yet"),
        ("evaluation.csv", "", "none of 1 runs has an evaluation yet"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_named(tmp_path, name, content, message):
    folder = write_run(tmp_path / "a", rates={10: 0.5})
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        run_report(config(tmp_path, folder))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "must hold a list of rows, got a dict"),
        ("[3]", "row 0 must be an object, got 3"),
        ('[{"task": "t", "agent": "a", "seed": 0, "step": 1}]', "row 0: success must be a number"),
    ],
)
def test_rows_that_are_none_are_named(tmp_path, content, message):
    (tmp_path / "rl.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        run_report(config(tmp_path, tmp_path / "rl.json"))


def test_nothing_found_says_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"no results found under '.*/none'; expected folders"):
        run_report(config(tmp_path, tmp_path / "none"))
    write_run(tmp_path / "a", rates={10: 0.5})
    with pytest.raises(ValueError, match=f"tasks: no run of 'x'; there are {CUBE}"):
        run_report(config(tmp_path, tmp_path / "a", tasks=("x",)))
    with pytest.raises(ValueError, match=r"methods must be among QAM, .*, got 'SAC'"):
        run_report(config(tmp_path, tmp_path / "a", methods=("ReBRAC", "SAC")))
    with pytest.raises(ValueError, match="runs: name at least one"):
        run_report(config(tmp_path))


def test_a_method_that_was_not_published_for_the_task_is_a_remark(tmp_path):
    write_run(tmp_path / "a", rates={100_000: 0.5})
    report = run_report(config(tmp_path, tmp_path / "a", methods=("dsrl", "rebrac")))
    assert report.remarks == (f"{CUBE}: no published curve of dsrl",)


def test_seeds_without_a_common_step_are_refused(tmp_path):
    write_run(tmp_path / "a", seed=0, rates={10: 0.2})
    write_run(tmp_path / "b", seed=1, rates={15: 0.2})
    with pytest.raises(ValueError, match="share no evaluation: seed 0: 1 from 10 to 10; seed 1: 1"):
        run_report(config(tmp_path, tmp_path / "?"))


# --- table ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_table_has_a_line_for_each_phase_and_one_over_tasks(tmp_path):
    rates = {CUBE: (0.2, 0.4, 0.9), MAZE: (0.5, 0.7, 0.6)}
    for task, finals in rates.items():
        for seed, final in enumerate(finals):
            write_run(
                tmp_path / f"{task}{seed}",
                task=task,
                seed=seed,
                rates={500_000: 0.1, 1_000_000: final},
                online={1_500_000: 1.0},
            )
    report = run_report(config(tmp_path, tmp_path))
    found = {(line.task, line.phase): line for line in report.lines}
    assert len(found) == len(report.lines) == 6
    line = found[CUBE, "offline"]
    assert (line.step, line.seeds, line.episodes, line.over) == (1_000_000, 3, 150, "seeds")
    assert line.mean == line.iqm == 0.5
    assert (line.mean_low, line.mean_high) == pytest.approx((0.2, 0.9))
    assert line.published == pytest.approx(0.8450, abs=1e-4)  # 84.5% in the published table
    assert found[MAZE, "offline"].published is None
    both = found["2 tasks", "offline"]
    assert (both.seeds, both.episodes) == (6, 300)
    assert both.mean == pytest.approx(0.55)
    assert both.iqm == pytest.approx(np.mean([0.4, 0.5, 0.6, 0.7]))
    scores = [np.array(finals) for finals in rates.values()]
    assert (both.mean_low, both.mean_high) == pytest.approx(bootstrap_interval(scores))
    assert found["2 tasks", "online"].mean == 1.0
    assert [row["mean"] for row in read_csv(tmp_path / "report" / "table.csv")] == [
        str(line.mean) for line in report.lines
    ]


def test_one_seed_has_the_interval_of_its_episodes(tmp_path, capsys):
    write_run(tmp_path / "a", rates={10: 0.6})
    show_report(config(tmp_path, tmp_path / "a"))
    (row,) = read_csv(tmp_path / "report" / "table.csv")
    low, high = wilson_interval(30, 50)
    assert (row["over"], float(row["mean_low"]), float(row["mean_high"])) == ("episodes", low, high)
    out = capsys.readouterr().out
    assert f"60.0 [ {100 * low:.1f},  {100 * high:.1f}]" in out
    assert "* one seed: the interval is Wilson's over its episodes" in out
    assert f"wrote {tmp_path / 'report' / CUBE}.png" in out


@pytest.mark.slow
def test_one_seed_of_each_task_has_no_bootstrap_interval(tmp_path, capsys):
    tasks = [MAZE.replace("task1", f"task{n}") for n in range(1, 6)]
    for task, rate in zip(tasks, (0.2, 0.8, 0.5, 0.4, 0.0), strict=True):
        write_run(tmp_path / task, task=task, rates={10: rate})
    two = run_report(config(tmp_path, tmp_path, tasks=tuple(tasks[:2]))).lines[-1]
    expected = wilson_interval(50, 100)
    assert (two.over, two.mean, two.iqm) == ("episodes", 0.5, 0.5)
    assert (two.mean_low, two.mean_high) == (two.iqm_low, two.iqm_high) == expected
    show_report(config(tmp_path, tmp_path))
    five = read_csv(tmp_path / "report" / "table.csv")[-1]
    low, high = wilson_interval(95, 250)
    assert (float(five["mean_low"]), float(five["mean_high"])) == (low, high)
    assert five["iqm_low"] == five["iqm_high"] == ""  # Wilson's is of the mean
    out = capsys.readouterr().out
    assert f"5**   38.0 [ {100 * low:.1f},  {100 * high:.1f}]   36.7\n" in out
    assert "** one seed of each task" in out
    folder = tmp_path / tasks[0]
    text = (folder / "evaluation.csv").read_text()
    (folder / "evaluation.csv").write_text(text.replace(",50,", ",10,"))
    two = run_report(config(tmp_path, tmp_path, tasks=tuple(tasks[:2]))).lines[-1]
    assert (two.mean, two.mean_low, two.iqm_high) == (0.5, None, None)  # other weights
    rows = read_csv(tmp_path / "report" / "curves.csv")
    assert {row["mean_low"] + row["mean_high"] for row in rows} == {""}


def test_a_published_rate_is_quoted_in_its_own_phase_only(tmp_path):
    write_run(tmp_path / "a", rates={50_000: 0.5}, online={100_000: 0.5})
    offline, online = run_report(config(tmp_path, tmp_path / "a")).lines
    assert offline.published is not None
    assert online.published is None  # there the published runs were offline still


@pytest.mark.slow
def test_published_figures_are_marked_where_runs_have_another_preset(tmp_path, drawn):
    write_run(tmp_path / "a", rates={50_000: 0.5}, preset="published")
    same = run_report(config(tmp_path, tmp_path / "a")).lines
    write_run(tmp_path / "b", agent="qam-f", rates={50_000: 0.5})  # preset small
    report = run_report(config(tmp_path, tmp_path))
    assert [line.preset for line in report.lines] == ["published", "small"]
    assert "+" not in format_table(same)
    rows = format_table(report.lines).splitlines()
    assert [row.endswith("+") for row in rows[1:3]] == [False, True]
    assert rows[-1] == "+ published runs have the preset published, these have: small"
    assert "runs of another preset" not in texts(drawn[0])
    assert "dashed: published QAM, QAM-F, 12 seeds; runs of another preset" in texts(drawn[1])


@pytest.mark.slow
def test_the_return_is_told_where_no_success_is(tmp_path):
    for agent, returns in (("bc", (-900.0, -700.0)), ("qam", (-200.0,))):
        for seed, value in enumerate(returns):
            folder = tmp_path / f"{agent}{seed}"
            write_run(folder, agent, "gym:Pendulum-v1", seed, {10: 0.0}, value=value)
    report = run_report(config(tmp_path, tmp_path))
    two, one = report.lines
    assert (two.mean_return, two.return_low, two.return_high) == (-800.0, -900.0, -700.0)
    assert (one.mean_return, one.return_low, one.return_high) == (-200.0, None, None)
    rows = format_table(report.lines).splitlines()
    assert rows[0].index("return") == rows[1].index("-800.0 [-900.0, -700.0]")
    assert rows[2].split()[-1] == "-200.0"
    assert [row["return"] for row in read_csv(tmp_path / "report" / "curves.csv")] == [
        "-800.0",
        "-200.0",
    ]
    assert report.remarks[0].startswith("bc on gym:Pendulum-v1: no episode succeeded; where an env")
    write_run(tmp_path / "other", rates={10: 0.0})
    rows = {"task": MAZE, "agent": "qam", "seed": 0, "step": 10, "phase": "offline"}
    (tmp_path / "rl.json").write_text(json.dumps([rows | {"success": 0, "episodes": 5}]))
    report = run_report(config(tmp_path, tmp_path / "other", tmp_path / "rl.json"))
    assert report.remarks == ()  # these tasks tell success
    assert [line.mean_return for line in report.lines] == [-1.5, None, None]  # and not over tasks


def test_the_printed_table_is_aligned(tmp_path):
    write_run(tmp_path / "a", rates={10: 1.0})
    write_run(tmp_path / "b", agent="qam-f", rates={10: 0.0})
    lines = format_table(run_report(config(tmp_path, tmp_path)).lines).splitlines()
    assert lines[0].index("mean %") == lines[1].index("100.0 [") == lines[2].index("  0.0 [")


@pytest.mark.slow
def test_curves_csv_holds_what_is_drawn(tmp_path):
    curves = np.array([[0.0, 0.5, 1.0], [0.2, 0.5, 0.6]])
    for seed, rates in enumerate(curves):
        steps = (10, 20, 30)
        write_run(tmp_path / f"{seed}", seed=seed, rates=dict(zip(steps, rates, strict=True)))
    run_report(config(tmp_path, tmp_path))
    rows = read_csv(tmp_path / "report" / "curves.csv")
    assert [int(r["step"]) for r in rows] == [10, 20, 30]
    assert [float(r["mean"]) for r in rows] == pytest.approx(curves.mean(0))
    low, high = bootstrap_interval([curves])
    assert [float(r["mean_low"]) for r in rows] == pytest.approx(low)
    assert [float(r["mean_high"]) for r in rows] == pytest.approx(high)


# --- pictures ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_picture_shows_curves_bands_and_published_ones(tmp_path, drawn):
    for seed in range(2):
        rates = {50_000: 0.1, 100_000: 0.3 + 0.2 * seed}
        write_run(tmp_path / f"q{seed}", seed=seed, rates=rates)
        write_run(tmp_path / f"b{seed}", agent="bc", seed=seed, rates=rates)
    report = run_report(config(tmp_path, tmp_path))
    with Image.open(report.files[0]) as image:
        assert image.width > 1000
    (figure,) = drawn
    (line,) = dashed(figure)
    published = published_curves(CUBE)["QAM"]
    np.testing.assert_array_equal(line.get_xdata(), [50_000, 100_000])
    np.testing.assert_array_equal(line.get_ydata(), published.mean[:2])
    assert line.get_color() == style.TILTED
    words = texts(figure)
    assert "qam  40" in words
    assert "bc  40" in words
    assert "mean of 2 seeds, 50 episodes an evaluation; bands: 95% bootstrap intervals" in words
    assert "dashed: published QAM, 12 seeds" in words
    assert "offline" not in words
    own = [x for x in figure.axes[0].lines if x.get_color() == style.TILTED and x is not line]
    np.testing.assert_allclose(own[0].get_xydata(), [(50_000, 0.1), (100_000, 0.4)])


def test_a_long_name_stays_on_the_sheet(tmp_path, drawn):
    label = "qam-e inverse_temperature=10.0 horizon=5"
    learning_curves(tmp_path / "a.png", [Curve(label, np.array([1, 2]), np.array([[0.1, 1.0]]))])
    figure = drawn[0]
    (name,) = [t for t in figure.axes[0].texts if t.get_text() == f"{label}  100"]
    assert name.get_window_extent().x1 < figure.bbox.width


@pytest.mark.slow
def test_published_curves_end_where_phases_differ(tmp_path, drawn):
    write_run(tmp_path / "a", rates={400_000: 0.5}, online={600_000: 1.0})
    run_report(config(tmp_path, tmp_path / "a", methods=("ReBRAC",)))
    lines = dashed(drawn[0])
    assert [line.get_xdata()[-1] for line in lines] == [400_000, 400_000]
    assert {line.get_color() for line in lines} == {style.TILTED, AGENTS["rebrac"].color}
    words = texts(drawn[0])
    assert "offline | online" in words
    assert "ReBRAC, published" in words
    assert "updates, then environment steps" in words
    write_run(tmp_path / "b", rates={1_000_000: 0.5}, online={1_500_000: 1.0})
    run_report(config(tmp_path, tmp_path / "b"))
    assert dashed(drawn[1])[0].get_xdata()[-1] == 1_500_000
    run_report(config(tmp_path, tmp_path / "b", published=False))
    assert dashed(drawn[2]) == []


def test_runs_that_end_before_the_first_published_evaluation_stand_alone(tmp_path, drawn):
    write_run(tmp_path / "a", rates={20_000: 0.5})
    run_report(config(tmp_path, tmp_path / "a"))
    assert dashed(drawn[0]) == []
    assert "published" not in texts(drawn[0])


def test_the_band_is_the_bootstrap_interval(tmp_path, drawn):
    success = np.random.default_rng(0).uniform(size=(4, 5))
    learning_curves(tmp_path / "a.png", [Curve("qam", np.arange(5) + 1, success)])
    (band,) = [c for c in drawn[0].axes[0].collections if isinstance(c, PolyCollection)]
    (path,) = band.get_paths()
    low, high = bootstrap_interval([success])
    for step in range(5):
        ys = path.vertices[path.vertices[:, 0] == step + 1][:, 1]
        assert {*np.round(ys, 9)} == {*np.round((low[step], high[step]), 9)}


def test_labels_keep_their_colours_and_never_share_one():
    assert colors(["bc", "qam tau=3"]) == [style.BASE, style.TILTED]
    many = colors(["qam", "qam a", "qam b", "unknown", "bc"])
    assert len({*many}) == 5
    assert many[0] == style.TILTED
    assert many[-1] == style.BASE


def test_spread_keeps_names_apart_in_order_and_near():
    values = [0.9, 0.88, 0.2, 0.91]
    y = spread(values, 0.1, 0.0, 1.0)
    assert np.argsort(y).tolist() == np.argsort(values).tolist()
    assert np.diff(np.sort(y)).min() >= 0.1 - 1e-12
    assert y[2] == 0.2
    assert y.max() <= 1.0
    middle = np.array([0.5, 0.5, 0.5])
    assert np.sort(spread(middle, 0.1, 0, 1)) == pytest.approx([0.4, 0.5, 0.6])


def test_counts_are_short():
    assert [counted(n) for n in (0, 500, 20_000, 1_500_000)] == ["0", "500", "20K", "1.5M"]


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        ([], "at least one curve"),
        ([Curve("a", np.array([2, 1]), np.zeros((1, 2)))], "steps of 'a' must be increasing"),
        ([Curve("a", np.array([1, 2]), np.zeros((1, 3)))], r"success of 'a' must be \(N, 2\)"),
        ([Curve("a", np.array([1]), np.array([[math.nan]]))], r"rates in \[0, 1\]"),
        ([Curve("a", np.array([1]), np.array([[50.0]]))], r"rates in \[0, 1\]"),
    ],
)
def test_curves_are_checked(tmp_path, curves, message):
    with pytest.raises(ValueError, match=message):
        learning_curves(tmp_path / "a.png", curves)
    assert not (tmp_path / "a.png").exists()


def test_trust_regions_are_noted_with_their_last_numbers(tmp_path):
    run = write_run(tmp_path / "one", agent="trqam", rates={1000: 0.5})
    plain = write_run(tmp_path / "two", seed=1, rates={1000: 0.5})
    (plain / "metrics.csv").write_text("iteration,loss\n1,2\n")
    head = "iteration,actor/path_kl,actor/path_kl_average,actor/multiplier,actor/kl_budget\n"
    lines = "10,0.3,0.2,0.99,1\n20,1.25,0.8,1.5,1\n30,9,9"  # the last is being written
    (run / "metrics.csv").write_text(head + lines)
    notes = [r for r in run_report(config(tmp_path, run, plain)).remarks if "budget" in r]
    assert notes == [
        f"trqam on {CUBE}, seed 0: path KL 0.8 nats per action (last 1.25) of a budget of 1, "
        "multiplier 1.5"
    ]
    other = write_run(tmp_path / "three", task=MAZE, rates={1000: 0.5})
    report = run_report(config(tmp_path, run, other, tasks=(MAZE,)))
    assert not any("budget" in r for r in report.remarks)
