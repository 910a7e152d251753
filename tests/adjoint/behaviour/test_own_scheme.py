"""A kernel of one's own through tilt, resume and certificate."""

import pytest
import torch
from helpers.linear_tilt import BASE, SLOPES, run, with_options
from helpers.own_schemes import Tempered
from helpers.tilt_problems import S2

from adjoint import Kernel, Moments, Scheme, TiltConfig, certify, make_kernel
from flows.grid import uniform
from flows.training import checkpoint as checkpoints
from flows.training.checkpoint import CheckpointError


@pytest.mark.slow
def test_a_tilt_with_a_scheme_of_ones_own_is_trained_and_certified():
    """The tilt of the chain itself: its variance takes the place of the base's."""
    found = run(with_options(kernel=Tempered(), steps=8, certificate_samples=2000))
    assert (found.kernel.name, found.kernel.steps) == ("tempered", 8)
    plain = run(with_options(kernel="ancestral_pair", steps=8, certificate_samples=2000))
    for one, other in (
        (found.field.w, plain.field.w),
        (found.certificate.log_weights, plain.certificate.log_weights),
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    before, after = found.certificate_base.log_weight_std, found.certificate.log_weight_std
    assert after < 0.6 * before
    assert bool((found.field.w.sign() == SLOPES.sign()).all())
    assert float(found.field.w.norm()) < S2 * float(SLOPES.norm())  # the chain has less variance
    kernel = make_kernel(Tempered(), uniform(8))
    x0 = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alone = certify(found.field, BASE, found.reward, kernel, x0, generator=torch.Generator())
    assert alone.log_weight_std == pytest.approx(after, rel=0.3)


def test_a_resume_knows_the_scheme_and_its_options(tmp_path):
    path = tmp_path / "c.pt"

    def tilted(kernel, iterations=4, **options):
        config = with_options(kernel=kernel, iterations=iterations)
        return run(config, checkpoint=path, **options)

    first = tilted(Tempered(0.9))
    assert checkpoints.load(path)["config"]["kernel"] == (
        "tempered: helpers.own_schemes.Tempered(level=0.9)"
    )
    again = tilted(Tempered(0.9), resume=True)
    assert torch.equal(first.field.w, again.field.w)
    for other in (Tempered(0.8), "ancestral"):
        with pytest.raises(CheckpointError, match=r"kernel.*Tempered\(level=0.9\)"):
            tilted(other, resume=True)


def test_a_resume_knows_what_a_description_does_not_hold(tmp_path, monkeypatch):
    class Deeper(Tempered):
        name = "deeper"
        depth = 0.9

        def __init__(self):
            super().__init__()
            self.hook = lambda x: x  # its address differs in every process

        def __call__(self, grid, moments):
            self.level, given = self.depth, self.level
            try:
                return super().__call__(grid, moments)
            finally:
                self.level = given

    def tilted(**options):
        config = with_options(kernel=Deeper(), iterations=3)
        return run(config, checkpoint=tmp_path / "c.pt", **options)

    tilted()
    tilted(resume=True)
    monkeypatch.setattr(Deeper, "depth", 0.8)
    with pytest.raises(CheckpointError, match="kernel_table"):
        tilted(resume=True)


class Noiseless(Tempered):
    name = "noiseless"

    def __call__(self, grid, moments):
        kernel = super().__call__(grid, moments)
        std = kernel.std.clone()
        std[2] = 0
        return Kernel(**{**vars(kernel), "std": std})


class Nothing(Tempered):
    name = "nothing"

    def __call__(self, grid, moments):
        return None


@pytest.mark.parametrize(
    ("kernel", "error", "message"),
    [
        (Noiseless(), ValueError, "std must be positive but for the last step's"),
        (Nothing(), TypeError, "a scheme must return a Kernel, got None"),
    ],
)
def test_tables_that_do_not_fit_are_refused_by_a_tilt(kernel, error, message):
    with pytest.raises(error, match=message):
        run(with_options(kernel=kernel, iterations=1))


def test_a_resume_with_the_options_of_a_finished_tilt_goes_on(tmp_path):
    config = with_options(iterations=3, base_samples=None, certificate_samples=None)
    first = run(config, checkpoint=tmp_path / "c.pt")
    again = run(first.config, checkpoint=tmp_path / "c.pt", resume=True)
    assert torch.equal(first.field.w, again.field.w)


class Renamed(Tempered):
    name = "ancestral"


class Needy(Tempered):
    name = "needy"
    needs = frozenset({"score"})


class Asking(Scheme):
    """A scheme that keeps the moments it was given."""

    name = "asking"
    summary = "the chain of moment_matched"
    needs = frozenset({"mmse", "covariance"})

    def __init__(self):
        self.given: list[Moments] = []

    def __call__(self, grid, moments):
        self.given.append(moments)
        return make_kernel("moment_matched", grid, mmse=moments.mmse)


def test_a_scheme_gets_the_moments_that_it_needs():
    scheme = Asking()
    run(with_options(kernel=scheme, iterations=1))
    *_, moments = scheme.given  # before that for a Gaussian, for which nothing is measured
    assert moments.mmse.shape == (5,)
    torch.testing.assert_close(
        moments.covariance, S2 * torch.eye(2, dtype=torch.float64), rtol=0, atol=0.03
    )


@pytest.mark.parametrize(
    ("kernel", "error", "message"),
    [
        (Renamed(), ValueError, "name of a scheme must be its own, got 'ancestral'"),
        (Needy(), ValueError, r"needs of a scheme must be of mmse, covariance, got \['score'\]"),
        (Tempered, TypeError, "kernel must be of type Scheme, got <class"),
    ],
)
def test_schemes_that_do_not_fit_are_refused(kernel, error, message):
    with pytest.raises(error, match=message):
        TiltConfig(kernel=kernel)
