"""The contract of a kernel: every scheme of the package keeps it, and what breaks it is found."""

import pytest
from helpers import own_schemes

from adjoint import KERNELS
from adjoint.testing import check_kernel


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_keeps_the_contract(name):
    check_kernel(name)


@pytest.mark.slow
def test_a_kernel_of_ones_own_keeps_the_contract():
    check_kernel(own_schemes.Tempered())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (own_schemes.WrongAdjoint(), r"Jacobian of the chain's own mean.* at step \d+ of 2"),
        (own_schemes.NotMemoryless(), "relative error of the variance must fall below"),
        (own_schemes.Infinite(), "residual_v must be finite"),
        (own_schemes.UniformOnly(), "steps of a grid of shift 3"),
        (own_schemes.SaysNoisy(), "noiseless_last must say whether"),
        (own_schemes.Halfway(), "std must be float64 of shape"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_what_breaks_the_contract_is_named(scheme, message):
    with pytest.raises(AssertionError, match=message):
        check_kernel(scheme)
