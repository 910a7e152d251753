"""The closed forms of the hard and the random problems agree with their definitions.

Each is tested on its own: the density of the tilt against base and reward, log Z against samples of
the base, samples against moments, and the optimal velocity against the identity of flow matching.
"""

import math

import pytest
import torch

from applications.toy2d.distances import mode_frequencies
from benchmarks.common.problems import hard_names, make_problem, names, random_name
from benchmarks.common.problems.closed_form import cell_probabilities
from benchmarks.common.problems.random_mixture import NAME
from flows import GaussianMixture

RANDOM = [random_name(5, index) for index in range(4)]
CLOSED = [*hard_names(), "mixture-8d", *RANDOM]
SIGMAS = 4.5


def size(problem):
    """Number of samples that a test draws: fewer in many dimensions."""
    return 2000 if problem.dim > 100 else 20_000


def generator():
    return torch.Generator().manual_seed(3)


def within_errors(samples, exact):
    """Whether the means of columns (N, C) agree with exact ones (C,) by their standard errors."""
    error = samples.std(0) / len(samples) ** 0.5
    return bool(((samples.mean(0) - exact).abs() <= SIGMAS * error + 1e-12).all())


@pytest.mark.slow
@pytest.mark.parametrize("name", CLOSED)
def test_density_of_the_tilt_is_base_times_reward_over_z(name):
    problem = make_problem(name)
    x = problem.sample(300, generator()).double()
    ratio = problem.velocity.log_prob(x) - problem.base.double().log_prob(x)
    expected = problem.reward(x) - problem.log_z
    torch.testing.assert_close(ratio, expected, rtol=0, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CLOSED if name != "strong/quadratic"])
def test_log_z_is_that_of_samples_of_the_base(name):
    problem = make_problem(name)
    r = problem.reward(problem.base.double().sample(size(problem), generator=generator()))
    values = (r - problem.log_z).exp()
    assert within_errors(values[:, None], torch.ones(1))


@pytest.mark.slow
@pytest.mark.parametrize("name", CLOSED)
def test_samples_have_the_moments_and_the_frequencies_of_the_tilt(name):
    problem = make_problem(name)
    exact = problem.velocity
    x = problem.sample(size(problem), generator()).double()
    assert within_errors(x, exact.mean())
    centred = x - exact.mean()
    assert within_errors(centred.square(), exact.covariance().diagonal())
    assert within_errors(centred[:, :1] * centred, exact.covariance()[0])
    f = problem.frequencies
    assert float(f.sum()) == pytest.approx(1)
    error = (f * (1 - f) / len(x)).sqrt()
    assert bool(((mode_frequencies(x, problem.modes) - f).abs() <= SIGMAS * error + 1e-4).all())


@pytest.mark.slow
@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("time", [0.2, 0.7])
def test_velocity_is_the_mean_of_the_differences(name, time):
    problem = make_problem(name)
    g = generator()
    x1 = problem.sample(size(problem), g).double()
    x0 = torch.randn(x1.shape, generator=g, dtype=torch.float64)
    x = time * x1 + (1 - time) * x0
    rest = x1 - x0 - problem.velocity(x, torch.tensor(time))  # of mean zero, whatever x is
    zero = torch.zeros(problem.dim)
    along = x @ torch.randn(problem.dim, generator=g, dtype=torch.float64)
    for function in (torch.ones(len(x)), along, (along / along.std()).tanh(), along.cos()):
        assert within_errors(rest * function[:, None], zero)


def test_narrow_modes_have_the_weights_that_the_reward_gives_them():
    for name in ("narrow_two/linear", "narrower_two/linear"):
        right = 1 / (1 + math.exp(-2))
        assert make_problem(name).frequencies.tolist() == pytest.approx([1 - right, right])
    for name in ("rare_1e-2/linear", "rare_1e-3/linear"):
        assert make_problem(name).frequencies.tolist() == pytest.approx([0.5, 0.5])
    three = make_problem("weights_1_10_100/linear")
    assert three.frequencies.tolist() == pytest.approx([1 / 3] * 3, abs=1e-4)
    assert (three.base.weights / three.base.weights[2]).tolist() == pytest.approx([100, 10, 1])


def test_strong_reward_moves_the_base_by_more_than_ten_nats():
    problem = make_problem("strong/quadratic")
    r = problem.reward(problem.sample(2000, generator()).double())
    assert float(r.mean()) - problem.log_z > 10


def test_embedded_ring_is_the_ring_in_the_plane():
    problem, plane = make_problem("ring-64d"), make_problem("ring/linear")
    assert problem.log_z == pytest.approx(plane.log_z, abs=1e-5)
    torch.testing.assert_close(problem.frequencies, plane.frequencies, rtol=0, atol=2e-4)
    distances = torch.cdist(problem.base.means, problem.base.means)
    mutual = torch.cdist(plane.base.means, plane.base.means)
    torch.testing.assert_close(distances.double(), mutual.double(), rtol=0, atol=1e-5)


def test_cells_of_two_modes_are_half_spaces():
    means = torch.tensor([[0.0, 0.0, 0.3], [1.0, 0.5, 0.0]], dtype=torch.float64)
    mixture = GaussianMixture.isotropic(means, torch.tensor([0.4, 0.8]), torch.tensor([1.0, 3.0]))
    half = float((means[0] - means[1]).norm()) / 2
    inside = torch.special.ndtr(half / torch.tensor([0.4, 0.8], dtype=torch.float64))
    expected = 0.25 * inside[0] + 0.75 * (1 - inside[1])
    assert float(cell_probabilities(mixture, means)[0]) == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("index", range(12))
def test_random_problems_are_as_described(index):
    problem = make_problem(random_name(2, index))
    base = problem.base.double()
    assert 1 <= problem.dim <= 16
    assert 2 <= len(base.weights) <= 6
    assert float(base.eigenvalues.min()) >= 0.03 - 1e-6
    assert float(base.eigenvalues.max()) <= 0.33 + 1e-6
    distances = torch.cdist(base.means, base.means) + 1e9 * torch.eye(len(base.means))
    std = float(base.eigenvalues.max().sqrt())
    assert float(distances.min()) / std >= 2 - 1e-4
    assert float(distances.min(1).values.max()) / std <= 4 + 1e-4
    r = problem.reward(base.sample(20_000, generator=generator()))
    assert 0.95 <= float(r.std()) <= 2.1


def test_random_problems_depend_on_seed_and_index_only():
    one, again = (make_problem(random_name(4, 1)) for _ in range(2))
    assert torch.equal(one.base.means, again.base.means)
    others = [make_problem(random_name(*at)) for at in ((4, 2), (5, 1), (1, 4))]
    assert len({other.log_z for other in [one, *others]}) == 4
    assert NAME.fullmatch(random_name(4, 1)).groups() == ("4", "1")
    dims = {make_problem(random_name(2, index)).dim for index in range(12)}
    assert len(dims) > 5


@pytest.mark.parametrize("name", ["ring/unknown", "mixture-3d", "random-1", "random-a-1", "hard"])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match=r"unknown problem|random-SEED-INDEX"):
        make_problem(name)


def test_names_are_those_of_the_problems():
    everything = [*names(), *hard_names()]
    assert len(set(everything)) == len(everything) == 25
    for name in (*hard_names(), "mixture-2d", random_name(0, 0)):
        problem = make_problem(name)
        assert problem.name == name
        assert problem.modes.shape == (len(problem.frequencies), problem.dim)
