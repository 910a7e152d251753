import csv
import math
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from matplotlib.quiver import Quiver
from PIL import Image

from applications.common.pictures import style
from applications.common.pictures.arrays import checked, density_of
from applications.toy2d.digits.pictures import class_frequencies, image_grid, mosaic
from applications.toy2d.pictures.animation import flow_animation
from applications.toy2d.pictures.charts import certificate_histogram, training_curves
from applications.toy2d.pictures.grid import gallery
from applications.toy2d.pictures.plane import Layer, control_field, particle_paths, triptych

EXTENT, R = 4.0, 40
AXIS = style.cell_centres(R, EXTENT)
X, Y = np.meshgrid(AXIS, AXIS, indexing="ij")


def gaussian(mean, std):
    return np.exp(-((X - mean[0]) ** 2 + (Y - mean[1]) ** 2) / (2 * std**2)) / (2 * np.pi * std**2)


def draw(mean, std, n, seed=0):
    return np.random.default_rng(seed).normal(mean, std, (n, 2))


def paths(mean, n=300, states=13):
    """Straight paths from noise to a Gaussian at ``mean``."""
    t = np.linspace(0, 1, states)[:, None, None]
    return (1 - t) * draw((0, 0), 1, n) + t * draw(mean, 0.3, n, 1)


def artists(ax, kind):
    return [c for c in ax.get_children() if isinstance(c, kind)]


def pixels(path):
    with Image.open(path) as image:
        image.verify()
    return np.asarray(Image.open(path).convert("RGB")).astype(float)


def texts(figure):
    return " | ".join(t.get_text() for t in figure.findobj(matplotlib.text.Text))


# --- arrays --------------------------------------------------------------------------------------


def test_density_of_is_the_density_blurred_by_its_kernel():
    p = density_of(draw((1.0, -2.0), 0.3, 200_000), EXTENT, resolution=R * 4, bandwidth=0.2)
    cell = 2 * EXTENT / (R * 4)
    assert p.sum() * cell**2 == pytest.approx(1, abs=1e-4)
    where = style.cell_centres(R * 4, EXTENT)
    i, j = np.unravel_index(p.argmax(), p.shape)
    assert (where[i], where[j]) == pytest.approx((1.0, -2.0), abs=0.1)  # first index is x
    assert p.max() == pytest.approx(1 / (2 * math.pi * (0.3**2 + 0.2**2)), rel=0.03)


def test_density_of_counts_samples_outside_of_the_window_as_lost_mass():
    x = np.concatenate([np.zeros((30, 2)), np.full((10, 2), 9.0)])
    p = density_of(x, EXTENT, resolution=80)
    assert p.sum() * 0.1**2 == pytest.approx(0.75, abs=1e-6)


def test_checked_takes_tensors_and_ties_equal_letters():
    assert checked(torch.ones(3, 3, requires_grad=True), "a", ("R", "R")).dtype == np.float64
    with pytest.raises(ValueError, match=r"a must have shape \(R, R\), got \(3, 4\)"):
        checked(np.ones((3, 4)), "a", ("R", "R"))
    with pytest.raises(ValueError, match=r"a must be finite, got 1 of 4"):
        checked(np.array([1, np.inf, 0, 0]), "a", ("N",))
    with pytest.raises(ValueError, match=r"a must have shape \(N, 2\), got \(0, 2\)"):
        checked(np.ones((0, 2)), "a", ("N", 2))


# --- pictures ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_triptych_shows_the_densities_the_samples_and_the_reward(tmp_path, drawn):
    base, exact = gaussian((0, 0), 1.0), gaussian((1.5, 0), 0.8)
    samples = draw((1.5, 0), 0.8, 2000)
    path = triptych(
        tmp_path / "new" / "triptych.png",
        Layer(draw((0, 0), 1, 500), base, "mean reward 0"),
        Layer(torch.from_numpy(samples)),
        Layer(density=torch.from_numpy(exact)),
        extent=EXTENT,
        reward=0.7 * X,
        shown=300,
    )
    assert path == tmp_path / "new" / "triptych.png"
    assert pixels(path).shape[0] > 600
    left, middle, right = drawn[0].axes
    images = [ax.images[0] for ax in (left, middle, right)]
    np.testing.assert_array_equal(images[0].get_array(), base.T)
    np.testing.assert_array_equal(images[1].get_array(), density_of(samples, EXTENT).T)
    np.testing.assert_array_equal(images[2].get_array(), exact.T)
    assert images[1].norm.vmax == images[2].norm.vmax == pytest.approx(1.2 * exact.max())
    (dots,) = artists(middle, PathCollection)
    np.testing.assert_array_equal(dots.get_offsets(), samples[:300])
    assert artists(right, PathCollection) == []
    for ax in (left, middle, right):
        (contours,) = artists(ax, ContourSet)
        for level, lines in zip(contours.levels, contours.get_paths(), strict=True):
            np.testing.assert_allclose(0.7 * lines.vertices[:, 0], level, atol=1e-9)
    assert "mean reward 0" in texts(drawn[0])
    assert "every 1 nat" in texts(drawn[0])
    np.testing.assert_allclose(np.diff(contours.levels), 1)


@pytest.mark.slow
def test_a_panel_tells_what_the_window_leaves_out(tmp_path, drawn):
    inside = np.zeros((100, 2))
    few, many = inside.copy(), inside.copy()
    few[:2], many[:3, 1] = EXTENT + 1, -EXTENT - 1
    layers = [Layer(points, caption="mean reward 0") for points in (inside, few, many)]
    triptych(tmp_path / "a.png", *layers, extent=EXTENT)
    captions = [[t.get_text() for t in ax.texts][1] for ax in drawn[0].axes]
    assert captions == ["mean reward 0", "mean reward 0", "mean reward 0, 3% outside"]


@pytest.mark.slow
def test_first_index_is_x_and_up_is_positive_y_in_the_file(tmp_path, drawn):
    layer = Layer(density=gaussian((2.5, 1.5), 0.3))
    image = pixels(triptych(tmp_path / "a.png", layer, layer, layer, extent=EXTENT)).sum(2)
    for ax in drawn[0].axes:
        box = ax.get_window_extent()
        rows = slice(round(image.shape[0] - box.y1) + 3, round(image.shape[0] - box.y0) - 3)
        panel = image[rows, round(box.x0) + 3 : round(box.x1) - 3]
        y, x = np.unravel_index(panel.argmax(), panel.shape)
        assert x / panel.shape[1] == pytest.approx((2.5 + EXTENT) / (2 * EXTENT), abs=0.02)
        assert y / panel.shape[0] == pytest.approx((EXTENT - 1.5) / (2 * EXTENT), abs=0.02)


def test_reward_levels_are_round_and_near_the_maximum():
    levels = style.reward_levels(np.linspace(-1000.0, 3.0, 500))
    assert levels.min() >= 3 - 8
    assert levels.max() < 3
    np.testing.assert_array_equal(levels, np.round(levels))
    assert len(style.reward_levels(np.ones((5, 5)))) == 0


@pytest.mark.slow
def test_particle_paths_draw_every_step_and_both_ends(tmp_path, drawn):
    base, tilted = paths((0, 2), n=50), paths((2, 0), n=50, states=7)
    pixels(particle_paths(tmp_path / "p.png", base, tilted, extent=EXTENT, shown=30, highlighted=4))
    for ax, xs in zip(drawn[0].axes, (base, torch.from_numpy(tilted).numpy()), strict=True):
        steps, marked = artists(ax, LineCollection)
        segments = np.array(steps.get_segments()).reshape(len(xs) - 1, 30, 2, 2)
        np.testing.assert_array_equal(segments[:, :, 0], xs[:-1, :30])
        np.testing.assert_array_equal(segments[:, :, 1], xs[1:, :30])
        assert np.diff(steps.get_colors().reshape(len(xs) - 1, 30, 4)[:, 0, 3]).min() > 0
        np.testing.assert_array_equal(np.stack(marked.get_segments()), xs[:, :4].swapaxes(0, 1))
        start, end = artists(ax, PathCollection)[:2]
        np.testing.assert_array_equal(start.get_offsets(), xs[0, :30])
        np.testing.assert_array_equal(end.get_offsets(), xs[-1, :30])


@pytest.mark.slow
def test_control_field_arrows_point_along_u_and_its_size_is_told(tmp_path, drawn):
    times = [0.0, 0.5]
    turn = np.stack([-Y, X], 2)
    control = np.stack([np.broadcast_to([3.0, 4.0], (R, R, 2)), turn])
    p = gaussian((0, 0), 1.0)
    path = tmp_path / "u.png"
    pixels(control_field(path, control, torch.tensor(times), extent=EXTENT, densities=[p, p]))
    (first,) = artists(drawn[0].axes[0], Quiver)
    np.testing.assert_allclose(first.V / first.U, 4 / 3)
    (second,) = artists(drawn[0].axes[1], Quiver)
    at = second.get_offsets()
    np.testing.assert_allclose(at[:, 0] * second.U + at[:, 1] * second.V, 0, atol=1e-12)
    assert (at[:, 0] * second.V > 0).all()  # counter-clockwise
    far, near = np.abs(at).sum(1).argmax(), np.abs(at).sum(1).argmin()
    assert second.get_facecolors()[far, 3] < 0.2 < 0.9 < second.get_facecolors()[near, 3]
    np.testing.assert_array_equal(drawn[0].axes[1].images[0].get_array(), p.T)
    # E|u|² is 25 for the constant and E|x|² = 2 for the rotation under N(0, I)
    assert "rms u = 5.00" in texts(drawn[0])
    assert "rms u = 1.41" in texts(drawn[0])


def test_control_field_estimates_the_density_from_samples(tmp_path, drawn):
    control, x = np.ones((1, 11, 11, 2)), draw((1.0, -1.0), 0.5, 3000)[None]
    control_field(tmp_path / "u.png", control, np.array([0.3]), extent=EXTENT, samples=x)
    shown = np.asarray(drawn[0].axes[0].images[0].get_array()).T
    where = style.cell_centres(len(shown), EXTENT)
    assert (shown.sum(1) @ where / shown.sum()) == pytest.approx(1.0, abs=0.05)
    with pytest.raises(ValueError, match="either densities or samples"):
        control_field(tmp_path / "u.png", control, np.array([0.3]), extent=EXTENT)


@pytest.mark.slow
def test_gallery_puts_every_density_in_its_place(tmp_path, drawn):
    maps = {
        f"row{i}": {f"col_{j}": gaussian((i - 1, j - 1), 0.4 + 0.1 * j) for j in range(4)}
        for i in range(3)
    }
    rewards = {"row1": {"col_2": X + Y}}
    pixels(gallery(tmp_path / "g.png", maps, extent=EXTENT, rewards=rewards, size=0.5))
    axes = np.array(drawn[0].axes, dtype=object).reshape(3, 4)
    for i in range(3):
        for j in range(4):
            image = axes[i, j].images[0]
            np.testing.assert_array_equal(image.get_array(), maps[f"row{i}"][f"col_{j}"].T)
            assert image.get_cmap() is (style.EMBER if j else style.ICE)
            assert len(artists(axes[i, j], ContourSet)) == ((i, j) == (1, 2))
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["row0", "row1", "row2"]
    assert [ax.get_title() for ax in axes[0]] == ["col 0", "col 1", "col 2", "col 3"]
    uneven = {"a": {"x": X**2, "y": X**2}, "b": {"x": X**2}}
    with pytest.raises(ValueError, match=r"densities\['b'\] must have the columns \['x', 'y'\]"):
        gallery(tmp_path / "h.png", uneven, extent=EXTENT)


# --- charts --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_certificate_bars_are_the_counts_and_the_numbers_are_right(tmp_path, drawn):
    rng = np.random.default_rng(0)
    before, after = rng.normal(0, 1.5, 5000), rng.normal(1.1, 0.02, 4000)
    path = tmp_path / "c.png"
    pixels(certificate_histogram(path, torch.from_numpy(before), after, log_z_exact=1.125))
    for ax, log_w in zip(drawn[0].axes, (before, after), strict=True):
        (step,) = artists(ax, StepPatch)
        counts, edges = np.histogram(log_w, bins=60)
        np.testing.assert_array_equal(step.get_data().values, counts)
        np.testing.assert_allclose(step.get_data().edges, edges)
        low, high = ax.get_xlim()
        assert low < before.min()
        assert high > before.max()
        log_z, exact = (line.get_xdata()[0] for line in ax.lines)
        assert log_z == pytest.approx(math.log(np.exp(log_w).mean()))
        assert exact == 1.125
    shown = texts(drawn[0])
    assert f"{before.std(ddof=1):.3g}" in shown
    assert f"{after.std(ddof=1):.3g}" in shown
    w = np.exp(after)
    error = w.std(ddof=1) / w.mean() / math.sqrt(len(w))
    assert f"log Z = {math.log(w.mean()):.3f} ± {error:.3f}" in shown
    assert f"ESS/N = {w.sum() ** 2 / (w**2).sum() / len(w):.2f}" in shown
    assert "exact log Z = 1.125" in shown
    assert "exact log Z = 1.125 ±" not in shown
    certificate_histogram(path, before, after, log_z_exact=1.125, log_z_exact_stderr=0.02)
    assert "exact log Z = 1.125 ± 0.020" in texts(drawn[1])


def test_certificate_of_an_exact_tilt_is_one_spike(tmp_path, drawn):
    before, after = np.random.default_rng(0).normal(0, 1, 500), np.full(300, 0.25)
    certificate_histogram(tmp_path / "c.png", before, after)
    (step,) = artists(drawn[0].axes[1], StepPatch)
    assert step.get_data().values.max() == 300
    assert np.ptp(step.get_data().edges) < 0.01


@pytest.mark.slow
def test_certificate_survives_weights_beyond_the_range_of_exp(tmp_path, drawn):
    certificate_histogram(tmp_path / "c.png", np.array([-900.0, -901.0]), np.array([900.0, 900.0]))
    assert drawn[0].axes[1].lines[0].get_xdata()[0] == pytest.approx(900)


@pytest.mark.slow
def test_training_curves_draw_rows_and_csv_alike(tmp_path, drawn):
    rng = np.random.default_rng(0)
    rows = [
        {"iteration": 10 * i, "loss": float(np.exp(-i / 20)), "reward": float(rng.normal(2, 1))}
        for i in range(120)
    ]
    rows[7]["reward"] = ""
    with (tmp_path / "log.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    training_curves(tmp_path / "a.png", rows, exact={"reward": 2.5}, smoothing=0.2)
    training_curves(tmp_path / "b.png", tmp_path / "log.csv", exact={"reward": 2.5}, smoothing=0.2)
    for figure in drawn:
        loss, reward = (ax for ax in figure.axes if ax.get_visible())
        np.testing.assert_allclose(loss.lines[0].get_ydata(), [row["loss"] for row in rows])
        np.testing.assert_allclose(loss.lines[0].get_xdata(), [row["iteration"] for row in rows])
        assert (loss.get_yscale(), reward.get_yscale()) == ("log", "linear")
        raw, smooth = (line.get_ydata() for line in reward.lines[:2])
        assert len(raw) == 119  # the blank is left out
        assert smooth.std() < 0.25 * raw.std()
        assert smooth.mean() == pytest.approx(raw.mean(), abs=0.2)
        assert reward.lines[3].get_ydata()[0] == 2.5
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.slow
def test_training_curves_break_where_another_loss_takes_over(tmp_path, drawn):
    losses = [100.0] * 60 + [1.0] * 40
    rows = [{"iteration": 10 * (i + 1), "loss": loss} for i, loss in enumerate(losses)]
    training_curves(tmp_path / "a.png", rows, refined_from=600, labels={"loss": "½ Var"})
    (ax,) = (ax for ax in drawn[0].axes if ax.get_visible())
    before, after, _, mark = ax.lines
    np.testing.assert_array_equal(before.get_ydata(), [100.0] * 60)  # no smoothing across
    np.testing.assert_array_equal(after.get_ydata(), [1.0] * 40)
    assert set(mark.get_xdata()) == {600}
    assert "refinement" in texts(drawn[0])
    assert "½ Var" in texts(drawn[0])
    training_curves(tmp_path / "a.png", rows, refined_from=1000)
    assert "refinement" not in texts(drawn[1])


def test_training_curves_explain_faint_lines_only_where_there_are_some(tmp_path, drawn):
    rows = [{"iteration": i, "loss": float(i % 3)} for i in range(100)]
    for n in (5, 100):
        training_curves(tmp_path / "a.png", rows[:n], subtitle="temperature 2")
    assert "temperature 2 |" in texts(drawn[0])
    assert "faint" not in texts(drawn[0])
    assert "temperature 2; faint: as logged; bright: smoothed" in texts(drawn[1])


def test_training_curves_draw_the_chosen_columns(tmp_path, drawn):
    rows = [{"iteration": i, "a": 1.0, "b": None, "c": 2.0} for i in range(5)]
    training_curves(tmp_path / "a.png", rows, columns=["c", "b"])
    assert "never logged" in texts(drawn[0])
    np.testing.assert_allclose(drawn[0].axes[0].lines[1].get_ydata(), 2.0)
    with pytest.raises(ValueError, match=r"columns must be among .*'a'.*, got \['reward'\]"):
        training_curves(tmp_path / "a.png", rows, columns=["a", "reward"])
    with pytest.raises(ValueError, match="rows must each have an iteration"):
        training_curves(tmp_path / "a.png", [{"loss": 1.0}])
    with pytest.raises(ValueError, match="rows must hold at least one row"):
        training_curves(tmp_path / "a.png", [])


# --- images --------------------------------------------------------------------------------------


def test_image_grid_shows_the_images_on_one_scale(tmp_path, drawn):
    rng = np.random.default_rng(0)
    base, tilted = rng.random((20, 8, 8)), 3 * rng.random((7, 8, 8))
    pixels(image_grid(tmp_path / "i.png", torch.from_numpy(base), tilted, columns=5, rows=3))
    left, right = (ax.images[0] for ax in drawn[0].axes)
    grid = np.ma.filled(left.get_array(), np.nan)
    assert grid.shape == (3 * 9 - 1, 5 * 9 - 1)
    np.testing.assert_array_equal(grid[9:17, 18:26], base[7])  # row 1, column 2
    assert np.isnan(grid[8]).all()
    np.testing.assert_array_equal(right.get_array()[9:17, 9:17], tilted[6])
    both = np.concatenate([base[:15], tilted])
    assert left.get_clim() == right.get_clim() == (both.min(), both.max())
    image_grid(tmp_path / "i.png", base, tilted, value_range=(-1.0, 1.0))
    assert drawn[1].axes[1].images[0].get_clim() == (-1.0, 1.0)
    assert np.isnan(mosaic(base[:4], 3, 2)[9:, 9:]).all()  # no images there


@pytest.mark.slow
def test_class_frequencies_draw_the_given_heights(tmp_path, drawn):
    base, tilted, exact = (np.random.default_rng(i).dirichlet(np.ones(10)) for i in range(3))
    path = tmp_path / "f.png"
    given = {"tilted_error": 0.2 * tilted, "exact_error": 0.1 * exact}
    pixels(class_frequencies(path, base, torch.from_numpy(tilted), exact, **given))
    (ax,) = drawn[0].axes
    bars = [c for c in ax.containers if isinstance(c, matplotlib.container.BarContainer)]
    heights = [[bar.get_height() for bar in series] for series in bars]
    np.testing.assert_array_equal(heights, [base, tilted, exact])
    for errors, error in zip(artists(ax, LineCollection), given.values(), strict=True):
        ends = np.array(errors.get_segments())[:, :, 1]
        np.testing.assert_allclose(ends[:, 1] - ends[:, 0], 4 * error)
    assert "two standard errors" in texts(drawn[0])
    class_frequencies(path, base, tilted, exact)
    assert "standard errors" not in texts(drawn[1])
    with pytest.raises(ValueError, match="labels must name 10 classes, got 3"):
        class_frequencies(path, base, tilted, labels=["a", "b", "c"])
    with pytest.raises(ValueError, match="exact_error must come with exact"):
        class_frequencies(path, base, tilted, exact_error=exact)


# --- animation -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_animation_moves_the_particles_to_where_they_end(tmp_path):
    base, tilted = paths((-2, 2), n=2000, states=31), paths((2, -2), n=2000, states=31)
    base[-1], tilted[-1] = (-2.0, 2.0), (2.0, -2.0)
    path = flow_animation(
        tmp_path / "a.gif", base, torch.from_numpy(tilted), extent=EXTENT, seconds=2.0, hold=1.0
    )
    assert path.stat().st_size < 3e6
    with Image.open(path) as movie:
        assert movie.n_frames == 31
        assert movie.info["loop"] == 0
        durations = []
        for k in range(31):
            movie.seek(k)
            durations.append(movie.info["duration"])
        last = np.asarray(movie.convert("RGB")).astype(float)
        movie.seek(0)
        first = np.asarray(movie.convert("RGB")).astype(float)
    assert len(set(durations[:-1])) == 1
    assert sum(durations[:-1]) == pytest.approx(2000, rel=0.15)
    assert durations[-1] == durations[0] + 1000
    for left, (x, y) in ((16, (-2, 2)), (16 + 336, (2, -2))):
        panel = last[40:360, left : left + 320].sum(2)
        row, column = np.unravel_index(panel.argmax(), panel.shape)
        assert column == pytest.approx((x / EXTENT + 1) * 160, abs=2)
        assert row == pytest.approx((1 - y / EXTENT) * 160, abs=2)
        assert panel[row, column] > 600
        start = first[40:360, left : left + 320].sum(2)
        assert start[120:200, 120:200].mean() > 2 * start[:40, :40].mean()
    red, _, blue = first[40:360, 16:336].mean((0, 1))
    assert blue > red  # the base is blue
    red, _, blue = first[40:360, 352:672].mean((0, 1))
    assert red > blue  # the tilt is amber


def test_animation_takes_the_states_nearest_to_uniform_times(tmp_path):
    xs = paths((1, 1), n=100, states=40)
    times = np.linspace(0, 1, 40) ** 2
    path = flow_animation(tmp_path / "a.gif", xs, xs, extent=EXTENT, times=times, frames=10)
    with Image.open(path) as movie:
        assert movie.n_frames == 10


@pytest.mark.slow
def test_animation_of_thousands_of_spread_particles_stays_small(tmp_path):
    rng = np.random.default_rng(0)
    t = np.linspace(0, 1, 61)[:, None, None]
    xs = t * rng.uniform(-3.5, 3.5, (4000, 2)) + (1 - t) * rng.standard_normal((4000, 2))
    path = flow_animation(tmp_path / "a.gif", xs, xs[:, ::-1], extent=EXTENT, reward=X**2)
    assert path.stat().st_size < 3e6


# --- all of them ---------------------------------------------------------------------------------

GOOD, MAP, XS = np.ones((5, 2)), np.ones((6, 6)), np.ones((4, 5, 2))
LAYER = Layer(GOOD)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: triptych(p, LAYER, Layer(), LAYER, extent=4), "tilted must hold samples"),
        (lambda p: triptych(p, LAYER, LAYER, Layer(XS), extent=4), r"exact.samples .*\(N, 2\)"),
        (lambda p: triptych(p, Layer(None, GOOD), LAYER, LAYER, extent=4), r"base.density .*\(R,"),
        (lambda p: triptych(p, Layer(None, -MAP), LAYER, LAYER, extent=4), r"base.density .*>= 0"),
        (lambda p: triptych(p, LAYER, LAYER, LAYER, extent=4, reward=GOOD), "reward .*shape"),
        (lambda p: triptych(p, LAYER, LAYER, LAYER, extent=-1), "extent must be .*-1"),
        (lambda p: particle_paths(p, XS, XS[:, :3], extent=4), "same number of particles"),
        (lambda p: particle_paths(p, XS, GOOD, extent=4), r"tilted must have shape \(K, N, 2\)"),
        (lambda p: particle_paths(p, XS[:1], XS, extent=4), "base must hold at least two states"),
        (lambda p: control_field(p, XS, GOOD, extent=4), r"control must have shape \(T, R, R, 2\)"),
        (lambda p: gallery(p, {}, extent=4), "densities must have at least one row"),
        (lambda p: gallery(p, {"a": {"b": GOOD}}, extent=4), r"densities\['a'\]\['b'\] must have"),
        (lambda p: certificate_histogram(p, GOOD, np.ones(3)), r"base must have shape \(N\)"),
        (lambda p: certificate_histogram(p, np.ones(3), np.array([1.0, np.nan])), "tilted must be"),
        (lambda p: certificate_histogram(p, np.ones(1), np.ones(3)), "base must hold at least two"),
        (lambda p: image_grid(p, XS, MAP), r"tilted must have shape \(N, 5, 2\)"),
        (lambda p: image_grid(p, XS, XS), "value_range must be increasing"),
        (lambda p: class_frequencies(p, np.ones(3), np.ones(4)), r"tilted must have shape \(3\)"),
        (lambda p: class_frequencies(p, np.ones(3), -np.ones(3)), "tilted flow must be >= 0"),
        (lambda p: flow_animation(p, XS, XS[:3], extent=4), r"tilted must have shape \(4, N, 2\)"),
        (lambda p: flow_animation(p, XS, XS, extent=4, times=-np.arange(4)), "times must increase"),
        (lambda p: flow_animation(p, XS[:1], XS[:1], extent=4), "at least 2, got 1"),
    ],
)
def test_bad_input_is_one_error_that_names_the_argument(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_fails_halfway_leaves_the_old_one(tmp_path, monkeypatch):
    path = class_frequencies(tmp_path / "f.png", np.ones(3), np.ones(3))
    old = path.read_bytes()

    def fail(figure, file, **options):
        file.write(b"half a picture")
        raise RuntimeError("no more")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(RuntimeError, match="no more"):
        class_frequencies(path, np.ones(4), np.ones(4))
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_pictures_leave_the_global_state_of_matplotlib_alone(tmp_path):
    code = (  # reading rcParams["backend"] would itself import pyplot
        "import sys, numpy as np, matplotlib\n"
        "rc = lambda: {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != 'backend'}\n"
        "before = rc()\n"
        "from applications.toy2d.digits import pictures\n"
        "from applications.toy2d.pictures import animation, charts, grid, plane\n"
        f"plane.particle_paths({str(tmp_path / 'a.png')!r}, np.ones((2, 3, 2)), "
        "np.ones((2, 3, 2)), extent=4)\n"
        "assert 'matplotlib.pyplot' not in sys.modules and before == rc()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
