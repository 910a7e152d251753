"""The three ways to combine a tilt with guidance, where class and whole are Gaussians.

With a class N(m_c, S_c) in a whole N(m_u, S_u) the guided velocity is affine in x.  Its ODE ends in
a Gaussian of variance S_u^{1-w} S_c^w and, where S_u = S_c = s², of mean m_u + w (m_c - m_u); then
it is that Gaussian's own flow.  Elsewhere it is the flow of no law, and its chain another Gaussian.
A reward λx adds S λ to the mean of a law of variance S.
"""

import math
import warnings

import pytest
import torch
from helpers.linear_tilt import Shift
from helpers.tilt_problems import S2, gaussian
from torch import nn

from adjoint.certificate import certify
from adjoint.chain.adjoints import lean_adjoint
from adjoint.chain.kernels import make_kernel
from adjoint.chain.rollout import rollout
from adjoint.tilt import TiltConfig, tilt
from flows.autodiff import velocity_and_vjp
from flows.field import Guided
from flows.grid import uniform
from flows.sampling import sample

F64 = torch.float64
W, SLOPE = 2.5, 0.8
M_U, M_C = -0.4, 0.6
STEPS = 10
NULL = {"c": torch.zeros(1, 1, dtype=F64)}
ONE = torch.ones(1, 1, dtype=F64)


def linear(x, cond=None):
    return SLOPE * x.sum(1)


def conditional(whole, of_class):
    """The field whose condition c is 1 for the class and 0 for no condition."""

    def field(x, t, cond):
        return torch.where(cond["c"] == 1, of_class(x, t), whole(x, t))

    return field


def always(field):
    """The field of the class, without a condition to be given."""
    return lambda x, t, cond=None: field(x, t, {"c": ONE.expand(len(x), 1)})


EQUAL = conditional(gaussian(M_U, S2), gaussian(M_C, S2))
NARROW = conditional(gaussian(M_U, 1.0), gaussian(M_C, 0.25))
BOTH_TILTED = conditional(gaussian(M_U + S2 * SLOPE, S2), gaussian(M_C + S2 * SLOPE, S2))
GUIDED_MEAN = M_U + W * (M_C - M_U)


class Offsets(nn.Module):
    """The base plus a number for each step of the chain: every tilt of an affine chain by λx."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.offset = nn.Parameter(torch.zeros(STEPS, 1, dtype=F64))

    def forward(self, x, t, cond=None):
        k = (t.reshape(-1) * STEPS).round().long().clamp_max(STEPS - 1)
        return self.base(x, t) + self.offset[k]


def tilted(base, model, kernel="euler_consistent", **options):
    config = TiltConfig(
        iterations=100,
        lr=0.05,
        ema_decay=0.0,
        steps=STEPS,
        batch_size=8,
        kernel=kernel,
        base_samples=2048,
        certificate_samples=2048,
        warmup=0,
        refine_fraction=0.0,
    )
    options = {"shape": (1,), "config": config, "model": model, "dtype": F64} | options
    return tilt(base, linear, **options)


def chain_law(base, kernel):
    """Mean and variance of the end of the chain of an affine base."""
    mean, variance = 0.0, 1.0
    for k, t in enumerate(kernel.t[:-1]):
        v, slope = velocity_and_vjp(base, torch.zeros_like(ONE), t, ONE)
        a = kernel.mean_x[k] + kernel.mean_v[k] * slope
        mean = float(a * mean + kernel.mean_v[k] * v)
        variance = float(a**2 * variance + kernel.std[k] ** 2)
    return mean, variance


def log_z(mean, variance):
    return SLOPE * mean + 0.5 * variance * SLOPE**2


# --- everywhere: the base of the tilt is guided --------------------------------------------------


@pytest.mark.slow
def test_everywhere_is_the_exact_tilt_where_the_guided_velocity_is_a_flow():
    base = always(Guided(EQUAL, W, NULL))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = tilted(base, Shift(base, (1,)), kernel="moment_matched")
    assert float(found.field.w.detach()) == pytest.approx(S2 * SLOPE, rel=0.01)
    assert found.certificate.log_weight_std < 0.03
    assert found.certificate.log_z == pytest.approx(log_z(GUIDED_MEAN, S2), abs=0.005)
    x = found.sample(4096, grid=20, generator=torch.Generator().manual_seed(0))
    assert float(x.mean()) == pytest.approx(GUIDED_MEAN + S2 * SLOPE, abs=0.04)


@pytest.mark.slow
def test_everywhere_is_the_tilt_of_the_law_of_the_guided_chain():
    """Judged by the affine chain in closed form, which the law of the ODE contradicts."""
    base = always(Guided(NARROW, W, NULL))
    with pytest.warns(UserWarning, match="the tilt is that of the chain's distribution.*guidance"):
        found = tilted(base, Offsets(base))
    mean, variance = chain_law(base, found.kernel)
    certificate = found.certificate
    assert certificate.log_weight_std < 0.005
    assert certificate.log_z == pytest.approx(log_z(mean, variance), abs=1e-3)
    error = math.sqrt(variance / 2048)
    assert float(certificate.samples.mean()) == pytest.approx(
        mean + SLOPE * variance, abs=4 * error
    )
    assert float(certificate.samples.var()) == pytest.approx(variance, rel=0.15)
    ode_variance = 0.25**W  # S_u = 1
    x = sample(
        base, torch.randn(4096, 1, generator=torch.Generator().manual_seed(0), dtype=F64), grid=50
    )
    assert float(x.var()) == pytest.approx(ode_variance, rel=0.1)
    ode = log_z(float(x.mean()), ode_variance)
    assert found.log_z_ode == pytest.approx(ode, abs=4 * found.log_z_ode_stderr)
    assert abs(ode - log_z(mean, variance)) > 0.1
    _, limit = chain_law(base, make_kernel("euler_consistent", uniform(300)))
    power = 1 / (W / 0.25 + (1 - W) / 1.0)  # of p(x|c)^w p(x)^{1-w}
    assert min(abs(math.log(limit / other)) for other in (power, ode_variance)) > 0.2


# --- at sampling only: the class is tilted, then guided ------------------------------------------


def test_at_sampling_the_null_field_decides_what_is_amplified():
    """Guidance multiplies the reward's effect by w unless the whole is tilted too."""
    of_class = conditional(gaussian(M_U, S2), gaussian(M_C + S2 * SLOPE, S2))
    x = torch.randn(9, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    t = torch.linspace(0, 1, 9, dtype=F64)
    cond = {"c": ONE.expand(9, 1)}
    for guided, mean in (
        (Guided(EQUAL, W, NULL), GUIDED_MEAN),
        (Guided(of_class, W, NULL, null_field=EQUAL), GUIDED_MEAN + W * S2 * SLOPE),
        (Guided(BOTH_TILTED, W, NULL), GUIDED_MEAN + S2 * SLOPE),
    ):
        exact = gaussian(mean, S2)(x, t)
        torch.testing.assert_close(guided(x, t, cond), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_a_tilt_that_draws_the_null_condition_too_tilts_both():
    """Trained without guidance on both conditions, and certified so; guided when sampling."""

    def cond_sampler(n, generator):
        return {"c": (torch.arange(n, dtype=F64) % 2)[:, None]}

    model = Shift(EQUAL, (1,))
    found = tilted(EQUAL, model, kernel="moment_matched", cond_sampler=cond_sampler)
    exact = torch.tensor([log_z(M_U, S2), log_z(M_C, S2)], dtype=F64).repeat(16)
    assert float((found.certificate.grouped - exact[:, None]).abs().max()) < 0.1
    x0 = torch.randn(4096, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    cond = {"c": ONE.expand(4096, 1)}
    x = sample(Guided(found.field, W, NULL), x0, grid=20, cond=cond)
    assert float(x.mean()) == pytest.approx(GUIDED_MEAN + S2 * SLOPE, abs=0.04)
    x = sample(Guided(found.field, W, NULL, null_field=found.base), x0, grid=20, cond=cond)
    assert float(x.mean()) == pytest.approx(GUIDED_MEAN + W * S2 * SLOPE, abs=0.04)


@pytest.mark.slow
def test_the_certificate_of_the_guided_fields_tells_how_far_it_is_from_everywhere():
    """With λ amplified by w, log w has the standard deviation |1 - w| λ s."""
    base, kernel = Guided(EQUAL, W, NULL), make_kernel("euler_consistent", uniform(200))
    x0 = torch.randn(4096, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    cond = {"c": ONE.expand(4096, 1)}

    def certificate(field):
        generator = torch.Generator().manual_seed(1)
        return certify(field, base, linear, kernel, x0, cond=cond, generator=generator)

    assert certificate(Guided(BOTH_TILTED, W, NULL)).log_weight_std < 0.02
    amplified = certificate(Guided(BOTH_TILTED, W, NULL, null_field=EQUAL))
    assert amplified.log_weight_std == pytest.approx((W - 1) * SLOPE * S2**0.5, rel=0.05)


# --- why everywhere is hard ----------------------------------------------------------------------


@pytest.mark.parametrize("weight", [1.0, 2.0, 4.0])
@pytest.mark.parametrize(("whole", "of_class"), [(1.0, 0.25), (0.25, 1.0)])
@pytest.mark.slow
def test_the_adjoint_is_multiplied_by_a_power_of_the_weight(whole, of_class, weight):
    """dc/dt = -2 J c gives c_0 = S_u (S_c/S_u)^w c_1: it vanishes or blows up."""
    base = always(Guided(conditional(gaussian(0.0, whole), gaussian(0.0, of_class)), weight, NULL))
    kernel = make_kernel("ancestral", uniform(200))
    x0 = torch.zeros(1, 1, dtype=F64)
    noise = torch.zeros(200, 1, 1, dtype=F64)
    xs = rollout(base, base, kernel, x0, noise).xs
    c = lean_adjoint(base, kernel, xs, ONE).values[0]
    assert float(c) == pytest.approx(whole * (of_class / whole) ** weight, rel=0.1)
