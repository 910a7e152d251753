"""Pictures of mazes and of actions: that what is drawn is where it should be."""

import itertools

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.quiver import Quiver
from PIL import Image

from applications.common.pictures import style
from applications.common.pictures.arrays import density_of
from applications.rl import find_task, make_environment
from applications.rl.report.action_pictures import (
    action_distribution,
    action_grid,
    repeated_action_values,
)
from applications.rl.report.maze_pictures import Maze, trajectories

WALLS = np.array([[1, 1, 1, 1], [1, 0, 0, 1], [1, 1, 0, 1], [1, 1, 1, 1]])
START, GOAL = np.array([0.0, 0.0]), np.array([4.0, 4.0])


def artists(ax, kind):
    return [c for c in ax.get_children() if isinstance(c, kind)]


def texts(ax):
    return " | ".join(t.get_text() for t in ax.findobj(matplotlib.text.Text))


def way(*corners, steps=10):
    """Positions along straight lines between corners."""
    t = np.linspace(0, 1, steps)[:, None]
    ends = itertools.pairwise(corners)
    return np.concatenate([(1 - t) * np.array(a) + t * np.array(b) for a, b in ends])


THROUGH = way((0, 0), (4, 0), (4, 4))
STUCK = way((0, 0), (3, 1))


# --- maze ----------------------------------------------------------------------------------------


def test_the_maze_of_an_environment_has_its_floor_where_positions_are():
    pytest.importorskip("ogbench")
    env = make_environment(find_task("pointmaze-medium-navigate-singletask-task1-v0"))
    maze = Maze.from_environment(env)
    rows, columns = maze.walls.shape
    for i in range(rows):
        for j in range(columns):
            x, y = env.unwrapped.ij_to_xy((i, j))
            assert (j * maze.unit - maze.offset[0], i * maze.unit - maze.offset[1]) == (x, y)
    assert maze.walls.sum() == np.sum(env.unwrapped.maze_map)
    left, right, bottom, top = maze.box
    assert (left, bottom) == (-4, -4)
    assert (right, top) == (24, 24)
    env.close()


def test_walls_are_drawn_where_they_are(tmp_path, drawn):
    trajectories(tmp_path / "a.png", Maze(WALLS), {"qam": [THROUGH]}, start=START, goal=GOAL)
    figure = drawn[0]
    image = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(float)
    ax = figure.axes[0]

    def brightness(x, y):
        column, row = ax.transData.transform((x, y))
        return image[int(image.shape[0] - row), int(column)].sum()

    floor, wall = brightness(0.0, 1.2), brightness(0.0, 4.0)  # cells (1, 1) and (2, 1)
    assert wall > floor + 30
    assert brightness(5.2, 1.2) == floor  # cell (1, 2)
    assert len(artists(ax, PatchCollection)[0].get_paths()) == WALLS.sum()


def test_edges_separate_walls_from_floor_only(tmp_path, drawn):
    trajectories(tmp_path / "a.png", Maze(WALLS), {"qam": [THROUGH]}, start=START, goal=GOAL)
    edges = artists(drawn[0].axes[0], LineCollection)[0].get_segments()
    assert len(edges) == 8  # around an L of three cells
    middles = {tuple(e.mean(0)) for e in edges}
    assert middles >= {(0.0, -2.0), (0.0, 2.0), (-2.0, 0.0), (6.0, 4.0), (2.0, 4.0)}


def test_trajectories_are_counted_and_failures_marked(tmp_path, drawn):
    policies = {"bc": [STUCK, STUCK, THROUGH], "qam": [THROUGH, THROUGH]}
    path = trajectories(tmp_path / "a.png", Maze(WALLS), policies, start=START, goal=GOAL)
    assert path.exists()
    bc, qam = drawn[0].axes
    assert "1 of 3 reach the goal, median 19 steps" in texts(bc)
    assert "2 of 2 reach the goal" in texts(qam)
    crosses = [line for line in bc.lines if line.get_marker() == "x"]
    assert [tuple(line.get_xydata()[0]) for line in crosses] == [(3.0, 1.0), (3.0, 1.0)]
    assert [line for line in qam.lines if line.get_marker() == "x"] == []
    heads = {t.get_text(): t.get_color() for ax in (bc, qam) for t in ax.texts}
    assert heads["bc"] == style.BASE
    assert heads["qam"] == style.TILTED
    path_of = artists(qam, LineCollection)[1].get_segments()
    np.testing.assert_allclose(path_of[0], THROUGH[:2])


def test_the_distance_at_which_the_goal_is_reached_is_an_option(tmp_path, drawn):
    near = {"qam": [way((0, 0), (4, 0), (4, 3.2))]}
    for radius in (0.5, 1.0):
        options = {"start": START, "goal": GOAL, "goal_radius": radius}
        trajectories(tmp_path / "a.png", Maze(WALLS), near, **options)
    assert "0 of 1" in texts(drawn[0].axes[0])
    assert "1 of 1" in texts(drawn[1].axes[0])


def test_all_are_counted_but_only_some_drawn(tmp_path, drawn):
    many = {"qam": [THROUGH] * 9}
    trajectories(tmp_path / "a.png", Maze(WALLS), many, start=START, goal=GOAL, shown=4)
    ax = drawn[0].axes[0]
    assert "9 of 9" in texts(ax)
    assert len(artists(ax, LineCollection)) == 1 + 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: Maze(np.zeros(3)), r"walls must be \(rows, columns\), got \(3,\)"),
        (lambda p: Maze(WALLS, unit=0.0), "unit must be positive"),
        (lambda p: Maze.from_environment(object()), "must be a maze of OGBench, got object"),
        (lambda p: trajectories(p, Maze(WALLS), {}, start=START, goal=GOAL), "at least one policy"),
        (
            lambda p: trajectories(p, Maze(WALLS), {"bc": []}, start=START, goal=GOAL),
            r"policies\['bc'\] must hold at least one trajectory",
        ),
        (
            lambda p: trajectories(
                p, Maze(WALLS), {"bc": [np.zeros((3, 4))]}, start=START, goal=GOAL
            ),
            r"policies\['bc'\]\[0\] must have shape \(T, 2\), got \(3, 4\)",
        ),
        (
            lambda p: trajectories(
                p, Maze(WALLS), {"bc": [THROUGH * np.nan]}, start=START, goal=GOAL
            ),
            "must be finite",
        ),
    ],
)
def test_errors_name_the_argument(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "a.png")


# --- actions -------------------------------------------------------------------------------------


def uphill(observations, chunks):
    """Four times the mean of the first components of the chunk's actions, plus the state's."""
    return 4 * chunks[:, ::2].mean(1) + observations[:, 0]


def two_ways(n=3000, seed=0):
    g = np.random.default_rng(seed)
    return np.clip(g.choice([-0.6, 0.6], (n, 1)) * [1, 0] + g.normal(0, 0.1, (n, 2)), -1, 1)


@pytest.mark.parametrize("horizon", [1, 3])
def test_values_of_repeated_actions_are_on_the_grid(horizon):
    v = repeated_action_values(uphill, torch.tensor([2.0, 7.0]), horizon=horizon, resolution=5)
    column = 2 + 4 * np.array([-0.8, -0.4, 0, 0.4, 0.8])
    np.testing.assert_allclose(v, np.tile(column[:, None], 5), atol=1e-6)
    np.testing.assert_allclose(action_grid(5)[7], [-0.4, 0.0], atol=1e-6)


@pytest.mark.slow
def test_the_three_panels_show_the_base_the_tilt_and_the_landscape(tmp_path, drawn):
    base = two_ways()
    tilted = base[base[:, 0] > 0]
    q = repeated_action_values(uphill, torch.zeros(2), horizon=1, resolution=41)
    path = action_distribution(tmp_path / "a.png", base, tilted, q)
    assert path.exists()
    left, middle, right = drawn[0].axes
    assert "behaviour" in texts(left)
    assert "tilted" in texts(middle)
    gain = 4 * (tilted[:, 0].mean() - base[:, 0].mean())
    assert f"mean τQ {gain:+.2f} nat" in texts(middle)
    shown = right.images[0].get_array()  # second index along the first component
    column = np.exp(4 * (style.cell_centres(41, 1) - 40 / 41))
    np.testing.assert_allclose(shown, np.tile(column, (41, 1)), rtol=1e-5)
    assert "τQ spans 7.8 nat" in texts(right)
    assert "contours: τQ, every 1 nat" in drawn[0].texts[2].get_text()
    dots = left.collections[-1].get_offsets()
    np.testing.assert_allclose(dots, base[:1500])


@pytest.mark.slow
def test_the_exact_panel_is_the_base_by_its_weights(tmp_path, drawn):
    base = two_ways()
    q = repeated_action_values(uphill, torch.zeros(2), horizon=1, resolution=41)
    log_w = 4 * base[:, 0]
    action_distribution(tmp_path / "a.png", base, base, q, log_weights=log_w)
    assert len(drawn[0].axes) == 4
    image = drawn[0].axes[3].images[0].get_array().T
    w = np.exp(log_w)
    right = w[base[:, 0] > 0].sum() / w.sum()
    assert image[100:].sum() / image.sum() == pytest.approx(right, abs=0.005)
    x = style.cell_centres(200, 1.12)
    mean = (image.sum(1) * x).sum() / image.sum()
    assert mean == pytest.approx((w * base[:, 0]).sum() / w.sum(), abs=0.01)
    ess = w.sum() ** 2 / (w**2).sum() / len(w)
    assert f"exact; ESS {100 * ess:.2g}%" in texts(drawn[0].axes[3])
    plain = drawn[0].axes[0].images[0].get_array()
    np.testing.assert_allclose(plain, density_of(base, 1.12).T)


def test_the_place_shows_the_walls_and_the_actions_as_arrows(tmp_path, drawn):
    base = two_ways()
    options = {"maze": Maze(WALLS), "position": np.array([4.0, 0.0]), "goal": GOAL}
    action_distribution(tmp_path / "a.png", base, base[:100], np.zeros((9, 9)), **options)
    assert len(drawn[0].axes) == 4
    ax = drawn[0].axes[0]
    blue, amber = artists(ax, Quiver)
    assert (blue.X == 4).all()
    assert (blue.Y == 0).all()
    np.testing.assert_allclose(np.stack([blue.U, blue.V], 1), 3 * base[:40])
    assert amber.get_facecolor()[0][:3] == pytest.approx(matplotlib.colors.to_rgb(style.TILTED))
    assert ax.get_xlim() == (-1.0, 9.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": np.zeros((3, 3))}, r"base must have shape \(N, 2\)"),
        ({"tilted": np.full((3, 2), np.nan)}, "tilted must be finite"),
        ({"landscape": np.zeros((3, 4))}, r"landscape must have shape \(R, R\)"),
        ({"log_weights": np.zeros(5)}, r"log_weights must have shape \(10\), got \(5,\)"),
        ({"maze": Maze(WALLS)}, "maze and position belong together"),
    ],
)
def test_actions_are_checked(tmp_path, changes, message):
    arguments = {"base": two_ways(10), "tilted": two_ways(10), "landscape": np.zeros((9, 9))}
    with pytest.raises(ValueError, match=message):
        action_distribution(tmp_path / "a.png", **(arguments | changes))
