"""Analytic tilts shared by the tests of the adjoint package."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flows.mixture import GaussianMixture

M, S2, LAMBDA = 0.5, 0.49, 1.0


def gaussian(mean: float = M, variance: float = S2) -> GaussianMixture:
    """One-dimensional Gaussian base."""
    return GaussianMixture(
        torch.ones(1, dtype=torch.float64),
        torch.tensor([[mean]], dtype=torch.float64),
        torch.tensor([[[variance]]], dtype=torch.float64),
    )


def linear(x: Tensor, cond=None) -> Tensor:
    """r(x) = λ Σ x."""
    return LAMBDA * x.sum(1)


@dataclass(frozen=True)
class Problem:
    """A mixture and the reward -½ xᵀA x + bᵀx."""

    base: GaussianMixture
    A: Tensor
    b: Tensor

    @property
    def dim(self) -> int:
        return self.base.means.shape[1]

    def reward(self, x: Tensor, cond=None) -> Tensor:
        return x @ self.b.to(x) - 0.5 * torch.einsum("bi,ij,bj->b", x, self.A.to(x), x)

    def exact(self) -> tuple[GaussianMixture, Tensor]:
        return self.base.tilt(self.A, self.b)


def mixture_problem(means, variances, weights, A, b) -> Problem:
    """Isotropic mixture in float64 from nested lists."""
    means = torch.tensor(means, dtype=torch.float64)
    eye = torch.eye(means.shape[1], dtype=torch.float64)
    covariances = torch.tensor(variances, dtype=torch.float64)[:, None, None] * eye
    return Problem(
        GaussianMixture(torch.tensor(weights, dtype=torch.float64), means, covariances),
        torch.tensor(A, dtype=torch.float64),
        torch.tensor(b, dtype=torch.float64),
    )


PROBLEMS = {
    "A": mixture_problem([[2.0], [-2.0]], [0.25, 0.25], [0.5, 0.5], [[0.0]], [0.6]),
    "B": mixture_problem([[-1.5], [1.2]], [0.09, 0.49], [0.5, 0.5], [[0.0]], [0.8]),
    "C": mixture_problem([[-1.5], [1.2]], [0.09, 0.49], [0.5, 0.5], [[1.5]], [0.9]),
    "square": mixture_problem(
        [[2.0, 2.0], [2.0, -2.0], [-2.0, 2.0], [-2.0, -2.0]],
        [0.25] * 4,
        [0.25] * 4,
        [[0.0, 0.0], [0.0, 0.0]],
        [0.6, 0.6],
    ),
    "three": mixture_problem(
        [[0.0, 2.0], [1.7, -1.0], [-1.7, -1.0]],
        [0.2, 0.3, 0.4],
        [0.2, 0.3, 0.5],
        [[0.3, 0.1], [0.1, 0.2]],
        [0.5, -0.3],
    ),
}
