"""The example on one page computes the package's numbers, from the same noise, in plain PyTorch."""

import ast
from pathlib import Path

import pytest
import torch

import adjoint as package
from examples import adjoint_matching as plain
from flows import GaussianMixture, uniform

STEPS, BATCH = 8, 64
BASE = GaussianMixture.isotropic(plain.MEANS.double(), plain.STD)
PAGE = Path(plain.__file__)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def reward(x, cond=None):
    return x @ plain.SLOPE.to(x)


@pytest.fixture
def net():
    """A network away from zero, where no control is zero."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(3, 16), torch.nn.SiLU(), torch.nn.Linear(16, 2)
    return torch.nn.Sequential(*layers).double()


@pytest.fixture
def both():
    """The chain of the example and the kernel of the package, with mmse from the same samples."""
    data, grid = BASE.sample(500, generator=seeded(1)), uniform(STEPS).double()
    mmse = package.measure_mmse(BASE, grid, data, generator=seeded(2))
    kernel = package.make_kernel("moment_matched", grid, mmse=mmse)
    return plain.make_chain(STEPS, data, normal(*data.shape, seed=2)), kernel


def equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_trajectories_adjoints_loss_and_gradient_are_those_of_the_package(both, net):
    chain, kernel = both
    x0, noise = normal(BATCH, 2), normal(STEPS, BATCH, 2, seed=3)

    def field(x, t, cond=None):
        return plain.velocity(net, x, t)

    xs, _ = plain.rollout(net, chain, x0, noise)
    equal(xs, package.rollout(field, BASE, kernel, x0, noise).xs)
    _, gradient, _ = package.Reward(reward).value_and_gradient(xs[-1])
    adjoint = package.lean_adjoint(BASE, kernel, xs, -gradient)
    adjoints = plain.lean_adjoint(chain, xs)
    equal(adjoints, adjoint.values)
    v = torch.stack([plain.velocity(net, x, t) for x, (t, *_) in zip(xs, chain, strict=False)])
    expected, _ = package.adjoint_matching_loss(v, adjoint, kernel)
    loss = plain.matching_loss(net, chain, xs, adjoints)
    equal(loss, expected)
    weights = list(net.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights), strict=True
    ):
        assert ours.abs().max() > 0
        equal(ours, theirs)


def test_log_weights_are_those_of_the_certificate(both, net):
    chain, kernel = both
    x0, noise = normal(BATCH, 2), normal(STEPS, BATCH, 2, seed=3)

    def field(x, t, cond=None):
        return plain.velocity(net, x, t)

    certificate = package.certify(field, BASE, reward, kernel, x0, generator=seeded(3))
    xs, log_w = plain.rollout(net, chain, x0, noise)
    equal(xs[-1], certificate.samples)
    equal(log_w, certificate.log_weights)
    assert certificate.log_weight_std > 0.1


@pytest.mark.slow
def test_training_halves_the_spread_of_the_log_weights(capsys):
    plain.main(updates=100, batch=128, steps=10)
    first, last = capsys.readouterr().out.splitlines()
    before, after = (float(line.split("std ")[1].split(";")[0]) for line in (first, last))
    assert after < before / 2
    found, exact = (
        float(part.split()[-1]) for part in last.split("log Z is")[1].split(", exactly")
    )
    assert found == pytest.approx(exact, abs=0.05)


def test_nothing_of_the_package_is_imported():
    nodes = ast.walk(ast.parse(PAGE.read_text(encoding="utf-8")))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    nodes = ast.walk(ast.parse(PAGE.read_text(encoding="utf-8")))
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert names == {"torch"}
