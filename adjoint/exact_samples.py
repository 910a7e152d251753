r"""Draws exact samples of a tilt, from a tilt that is not quite exact.

Samples of the tilted flow are accepted by their weights (`adjoint.rejection`).  There are two
distributions whose tilt they can be of, since a base has two: the distribution at the end of its
memoryless chain in K steps, and that of its ODE, the flow's own.  They agree as K grows.

``"chain"`` proposes trajectories of the tilted chain, whose weights are those of the certificate,

    w = p_chain(path) e^{r(x_K)} / p_θ(path).

A trajectory costs 2 K evaluations, and a gradient none.

``"flow"`` proposes samples x of the tilted flow's ODE, with the ratio of two densities as weights,

    w = p_flow(x) e^{r(x)} / q(x),

log p_flow and log q by `flows.sampling.log_likelihood` of the base and of the tilted flow.  It is
exact up to the error of the solver, whatever the chain; but each evaluation takes d backward
passes, so that it serves up to `LIKELIHOOD_DIMS` dimensions.  E[w] is the flow's own Z.

Source: exact simulation of paths by rejection, as in Beskos and Roberts, "Exact simulation of
diffusions" (2005), here with a learned proposal.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping

import torch
from torch import Tensor

from adjoint.certificate import certify_batch
from adjoint.chain.kernels import Kernel
from adjoint.evaluator import Evaluator
from adjoint.rejection import CUT, MAX_TRAJECTORIES, Proposal, sample_by_rejection
from adjoint.rewards.reward import ValueFunction, as_reward
from flows.field import Cond, VelocityField
from flows.sampling import log_likelihood, sample

DISTRIBUTIONS = {"chain": "the tilt of the base's chain", "flow": "the tilt of the flow's ODE"}
"""The distributions that exact samples can be of, and how messages call them."""

ODE_STEPS = 100
"""Steps of the midpoint rule in samples and likelihoods of the flow."""

LIKELIHOOD_DIMS = 256
"""Most dimensions in which likelihoods, of d backward passes an evaluation, are computed."""


def sample_exact(
    field: VelocityField | Evaluator,
    base: VelocityField | Evaluator,
    reward: ValueFunction,
    kernel: Kernel,
    n: int,
    *,
    like: Tensor,
    distribution: str = "chain",
    seen: Tensor | None = None,
    cut: float = CUT,
    cond: Cond | None = None,
    batch_size: int = 4096,
    max_trajectories: int = MAX_TRAJECTORIES,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> Tensor:
    """Return ``n`` independent samples (n, *) of the exact tilt of the base, by rejection.

    Arguments:
        field, base, reward, kernel: as for `adjoint.certificate.certify`.
        like: one sample (*), for shape, dtype and device.
        distribution: "chain" draws the tilt of the base's chain of ``kernel``, "flow" the tilt of
            the distribution of the base's ODE; see the module docstring.
        seen: (N,) log-weights known already: for "chain" of a certificate of the same tilt, for
            "flow" of a `flow_proposal`.
        cond: one condition, of leading size 1: Z, and so the ceiling, is of one alone.
        batch_size: trajectories at a time.
        generator: on the device of ``like``.
        cut, max_trajectories, progress: as for `adjoint.rejection.sample_by_rejection`.

    Several processes draw each its own, with numbers of evaluations that differ: not for fields
    that are sharded over them, whose evaluations have to meet.

    Raises:
        TypeError: ``n`` is no integer, ``generator`` no generator or ``cond`` no mapping.
        ValueError: ``n``, ``cut`` or ``max_trajectories`` out of range, an unknown distribution,
            likelihoods in more than `LIKELIHOOD_DIMS` dimensions, several conditions, weights so
            uneven that more than ``max_trajectories`` would be needed, or NaN.

    Warns:
        UserWarning: more of the tilt's mass than asked for lies above the ceiling, as far as the
            halves of the weights know of each other.
    """
    check_request(n, cond, generator)
    sizes = {name: len(c) for name, c in (cond or {}).items()}
    if any(size != 1 for size in sizes.values()):
        raise ValueError(
            f"cond must be one condition, of leading size 1, got leading sizes {sizes}: under "
            "several conditions log Z has several values"
        )
    check_distribution(distribution, like.numel())
    if distribution == "flow":
        propose = flow_proposal(field, base, reward, like, cond, generator=generator)
    else:
        propose = chain_proposal(field, base, reward, kernel, like, cond, generator=generator)
    return sample_by_rejection(
        propose,
        n,
        like=like,
        distribution=DISTRIBUTIONS[distribution],
        seen=seen,
        cut=cut,
        batch_size=batch_size,
        max_trajectories=max_trajectories,
        generator=generator,
        progress=progress,
    )


def chain_proposal(
    field: VelocityField | Evaluator,
    base: VelocityField | Evaluator,
    reward: ValueFunction,
    kernel: Kernel,
    like: Tensor,
    cond: Cond | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Proposal:
    """Return a function that draws n ends of the tilted chain with their log-weights.

    The arguments are those of `sample_exact`.
    """

    def propose(n: int) -> tuple[Tensor, Tensor]:
        x0 = _noise(like, n, generator)
        found = certify_batch(
            field, base, reward, kernel, x0, _repeat(cond, n), generator=generator
        )
        return found.samples, found.log_weights

    return propose


def flow_proposal(
    field: VelocityField | Evaluator,
    base: VelocityField | Evaluator,
    reward: ValueFunction,
    like: Tensor,
    cond: Cond | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Proposal:
    """Return a function that draws n ODE samples of the tilted flow with their log-weights.

    The mean weight estimates the flow's own Z: `adjoint.log_mean_exp` of the log-weights is log Z
    with its standard error.  The arguments are those of `sample_exact`.
    """
    tilted, untilted, value = Evaluator.of(field), Evaluator.of(base), as_reward(reward)

    def propose(n: int) -> tuple[Tensor, Tensor]:
        some = _repeat(cond, n)

        def log_density(flow: Evaluator, x: Tensor) -> Tensor:
            return log_likelihood(flow.at, x, grid=ODE_STEPS, method="midpoint", cond=some)[0]

        x0 = _noise(like, n, generator)
        x = sample(tilted.at, x0, grid=ODE_STEPS, method="midpoint", cond=some)
        with torch.no_grad():
            rewards = value(x, some)
        return x, log_density(untilted, x) + rewards - log_density(tilted, x)

    return propose


def check_distribution(distribution: str, dim: int) -> None:
    """Refuse an unknown distribution, and likelihoods in too many dimensions.

    Raises:
        ValueError: naming the argument, its value and what was expected.
    """
    if distribution not in DISTRIBUTIONS:
        known = " or ".join(map(repr, DISTRIBUTIONS))
        raise ValueError(f"distribution must be {known}, got {distribution!r}")
    if distribution == "flow" and dim > LIKELIHOOD_DIMS:
        raise ValueError(
            f"distribution must be 'chain' above {LIKELIHOOD_DIMS} dimensions, got 'flow' in {dim}:"
            " a likelihood takes a backward pass for each of them in every evaluation"
        )


def check_request(n: int, cond: Cond | None, generator: torch.Generator | None) -> None:
    """Refuse a number of samples, conditions or a generator of the wrong type.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.
    """
    if not isinstance(n, numbers.Integral) or isinstance(n, bool):
        raise TypeError(f"n must be an integer, got {n!r}")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {generator!r}")
    if cond is not None and not isinstance(cond, Mapping):
        raise TypeError(f"cond must map names to tensors, got {type(cond).__name__}")


def _noise(like: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    """Return n standard normal starts of the shape of ``like``."""
    return torch.randn((n, *like.shape), generator=generator, dtype=like.dtype, device=like.device)


def _repeat(cond: Cond | None, n: int) -> Cond | None:
    """Return one condition, of leading size 1, n times."""
    return {name: c.expand(n, *c.shape[1:]) for name, c in (cond or {}).items()} or None
