"""Metrics of a tilt of the digits: class frequencies, and distances to the training images.

Nothing is known in closed form here, so tilted samples are compared with samples of the base that
are resampled by importance.  Base and tilt must be sampled in one way: the ODE and the memoryless
chain of one learned velocity generate two distributions (no learned velocity is exactly a
conditional mean, and a chain of K steps has a discretisation error), whose class frequencies differ
by a few parts in a hundred.  So samples of the tilted ODE are compared with resampled samples of
the base's ODE, and samples of the tilted chain, and the certificate, with those of the base's
chain.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from applications.toy2d.digits.classifier import Classifier
from applications.toy2d.digits.data import CLASSES, Digits, add_noise
from applications.toy2d.exact_tilt import ResampledTilt, RewardFunction, resample_tilt
from flows import Cond


@dataclass(frozen=True, eq=False)
class Comparison:
    """Class frequencies of a base, its tilt and the exact tilt, with their errors.

    Attributes:
        base, tilted, exact: (10,) frequencies.
        tilted_error, exact_error: (10,) standard errors of the last two.
        resampled: the base's samples with their weights.
    """

    base: Tensor
    tilted: Tensor
    exact: Tensor
    tilted_error: Tensor
    exact_error: Tensor
    resampled: ResampledTilt

    @property
    def z(self) -> Tensor:
        """Return the differences of tilted and exact in standard errors, (10,).

        A difference of zero is 0 even without an error; where an error is infinite, z is NaN.
        """
        error = (self.tilted_error.square() + self.exact_error.square()).sqrt()
        difference = self.tilted - self.exact
        z = torch.where(difference == 0, 0.0, difference / error)
        return torch.where(error.isinf(), torch.nan, z)

    @property
    def total_variation(self) -> float:
        """Return half the sum of the absolute differences."""
        return float((self.tilted - self.exact).abs().sum() / 2)


def one_hot(classifier: Classifier, x: Tensor) -> Tensor:
    """Classify images (N, 64); the recognised digits are one-hot (N, 10), float64."""
    return nn.functional.one_hot(classifier.labels(x), CLASSES).double()


def compare_classes(
    classifier: Classifier,
    base: Tensor,
    tilted: Tensor,
    reward: RewardFunction,
    temperature: float,
    *,
    weights: Tensor | None = None,
) -> Comparison:
    """Compare the classes of ``tilted`` (M, 64) with the exact tilt of samples ``base`` (N, 64).

    Arguments:
        weights: of the tilted samples, (M,), summing to one, such as the certificate's, which
            correct what the tilt still lacks; equal by default.
    """

    def scaled(x: Tensor, cond: Cond | None = None) -> Tensor:
        return reward(x, cond) / temperature

    resampled = resample_tilt(base, scaled)
    classes, drawn = one_hot(classifier, base), one_hot(classifier, tilted)
    exact, exact_error = resampled.mean(classes)
    w = torch.full((len(tilted), 1), 1 / len(tilted)) if weights is None else weights[:, None]
    w = w.to(drawn)
    found = (w * drawn).sum(0)
    found_error = (w * (drawn - found)).square().sum(0).sqrt()
    return Comparison(
        base=classes.mean(0).cpu(),
        tilted=found.cpu(),
        exact=exact.cpu(),
        tilted_error=found_error.cpu(),
        exact_error=exact_error.cpu(),
        resampled=resampled,
    )


def nearest_distance(x: Tensor, images: Tensor) -> Tensor:
    """Measure the distance (N,) of each of ``x`` (N, 64) to the nearest of ``images`` (M, 64)."""
    return torch.cat([torch.cdist(part, images).amin(1) for part in x.split(1024)])


def training_distances(
    classifier: Classifier, data: Digits, digit: int, tilted: Tensor, exact: ResampledTilt
) -> dict[str, float]:
    """Average the distance to the nearest training image over images recognised as ``digit``.

    The distance depends on the digit, so all four means are taken over one digit: over samples of
    the base, the same samples weighted by the exact tilt, samples of the tilted flow, and held-out
    images with the noise that the flow was trained with.
    """

    def chosen(x: Tensor) -> Tensor:
        return classifier.labels(x) == digit

    held_out = add_noise(data.test, generator=torch.Generator().manual_seed(0))
    mask = chosen(exact.samples)
    base = nearest_distance(exact.samples[mask], data.train).double()
    weights = exact.weights[mask] / exact.weights[mask].sum()
    found = nearest_distance(tilted[chosen(tilted)], data.train)
    return {
        "nn_distance_base": float(base.mean()),
        "nn_distance_exact": float(weights @ base),
        "nn_distance_tilted": float(found.mean()),
        "nn_distance_held_out": float(
            nearest_distance(held_out[chosen(held_out)], data.train).mean()
        ),
    }
