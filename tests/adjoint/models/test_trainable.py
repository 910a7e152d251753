"""The module that a tilt trains where the caller names none."""

import pytest

from adjoint.models.trainable import trainable


@pytest.mark.parametrize(
    ("dim", "width"), [(1, 128), (64, 128), (100, 200), (256, 512), (4000, 1024)]
)
def test_the_residual_network_grows_with_the_dimension(dim, width):
    model = trainable(lambda x, t, cond=None: 0 * x, (dim,), seed=0)
    widths = [layer.out_features for layer in model.correction.layers]
    assert widths[:3] == [width] * 3
