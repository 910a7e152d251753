"""The module that a tilt trains where the caller names none."""

import pytest
import torch

from adjoint.models.estimate_informed import ESTIMATE, EstimateInformed
from adjoint.models.trainable import trainable
from flows import GaussianMixture, Residual
from flows.testing import check_velocity_field

CENTRES = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])


@pytest.mark.parametrize(
    ("dim", "width"), [(1, 128), (64, 128), (100, 200), (256, 512), (4000, 1024)]
)
def test_the_residual_network_grows_with_the_dimension(dim, width):
    model = trainable(lambda x, t, cond=None: 0 * x, (dim,), seed=0)
    widths = [layer.out_features for layer in model.correction.layers]
    assert widths[:3] == [width] * 3


def test_the_correction_sees_the_estimate_of_the_base():
    """Of the base's conditional mean, at a scalar time, a time for each state, and at S times."""
    seen = []

    def correction(x, t, cond):
        seen.append(cond[ESTIMATE])
        return 0 * x

    base = GaussianMixture.isotropic(CENTRES, 0.3)
    x = torch.randn(3, 5, 2)
    t = torch.tensor([0.1, 0.5, 0.9])
    field = EstimateInformed(base, torch.nn.Module())
    field.correction.forward = correction
    rows = [field(x[k], t[k]) for k in range(3)]
    expected = [x[k] + (1 - t[k]) * base(x[k], t[k]) for k in range(3)]
    torch.testing.assert_close(seen, expected)
    torch.testing.assert_close(rows, [base(x[k], t[k]) for k in range(3)])
    seen.clear()
    field(x[:, 0], t)
    field(x, t[:, None])
    torch.testing.assert_close(seen[0], torch.stack(expected)[:, 0])
    torch.testing.assert_close(seen[1], torch.stack(expected))


@pytest.mark.parametrize(("dim", "kind"), [(32, Residual), (33, EstimateInformed)])
def test_the_default_model_is_a_velocity_field_that_starts_at_the_base(dim, kind):
    base = GaussianMixture.isotropic(torch.randn(2, dim), 0.3)
    cond = {"estimate": torch.randn(4, 3)}  # a name that a user may well give
    model = trainable(base, (dim,), seed=0, cond=cond)
    assert type(model) is kind
    assert model.broadcasts
    x, t = torch.randn(4, dim), torch.tensor(0.4)
    torch.testing.assert_close(model(x, t, cond), base(x, t))
    torch.nn.init.normal_(model.correction.last.weight)
    check_velocity_field(model, x, cond)
