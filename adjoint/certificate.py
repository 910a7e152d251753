r"""The certificate of a tilt: how good it is, by the log-weights of its own trajectories.

On a trajectory of the tilted chain, with d_k = mean_v (v_θ - v_β)(x_k, t_k),

    log w = r(x_K) + Σ_k [log N_β(x_{k+1}|x_k) - log N_θ(x_{k+1}|x_k)]
          = r(x_K) - Σ_k (½‖u_k‖² + u_k·ε_k),        u_k = d_k / std_k

(u_k = L_k⁻¹ d_k where the noise is L_k ε_k).  Here w is the density of the tilted path distribution
p_β(path) e^{r} with respect to the path distribution of the model, so E[w] = Z = E_β[e^r] for *any*
model, and E[w f]/E[w] is the expectation of f under the exact tilt of the base chain.  At the
optimum log w is constant and equals log Z: its standard deviation is the headline number, and zero
means done.  The log-weights cannot see regions that the model never visits, nor the discretisation
error of the base chain itself; `adjoint.judgement` looks for both by other samples.

With conditions, log w at the optimum is log Z(c), and its spread over the conditions says nothing.
So trajectories come in groups of one condition each: variances are those within groups, weights sum
to one over each group but for the number of groups (so that means are over p(c) p*(x|c)), and log Z
is the mean of log Z(c) over the groups.

Where few samples carry all the weight, their spread says nothing about the error: it vanishes when
one is left.  Standard errors are therefore infinite below `ENOUGH` effective samples, ``ess`` · N;
not far above they are still too small where the weights have heavy tails.

Sources: Girsanov's theorem in discrete time; Nüsken and Richter 2005.05409 (log-variance as a
measure of optimality); self-normalised importance sampling as in Owen's "Monte Carlo theory".

With several processes, each runs its own trajectories, and each gets the certificate of all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from adjoint.chain.kernels import Kernel
from adjoint.chain.rollout import Trajectory, draw_noise, rollout
from adjoint.evaluator import Evaluator
from adjoint.micro_batches import chunks, rows_of
from adjoint.rewards.reward import ValueFunction, as_reward
from flows.field import Cond, VelocityField
from flows.training import distributed

ENOUGH = 10
"""Effective samples below which standard errors are infinite."""

PER_CONDITION = 64
"""Trajectories that share a condition where log-weights are compared under each."""


def log_mean_exp(values: Tensor) -> tuple[float, float, float]:
    """Return log mean e^values of values (N,), its standard error, and the ESS / N.

    Of groups (G, N): the mean of log mean e^values, its standard error for these groups, and the
    harmonic mean of the groups' effective sizes.  The error is by the delta method, the relative
    standard error of the mean; infinite below `ENOUGH` effective samples (in the typical group).
    The logarithm of a mean is biased low by half the square of that error in each group.
    """
    groups = values.double().reshape(-1, values.shape[-1])
    n = groups.shape[1]
    weights = torch.softmax(groups, 1)
    log_mean = float((groups.logsumexp(1) - math.log(n)).mean())
    effective = 1 / float(weights.square().sum(1).mean())
    if effective < ENOUGH:
        return log_mean, math.inf, effective / n
    return log_mean, float((weights.var(1).mean() * n / len(groups)).sqrt()), effective / n


def path_log_ratio(
    trajectory: Trajectory, v_base: Tensor, kernel: Kernel, v: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the log density ratio Σ_k log N_β/N_θ and the path KL of each trajectory, each (B,).

    Arguments:
        trajectory: of any velocity, with the noise that made it.
        v_base: (K, B, *) base velocity at its states.
        v: (K, B, *) velocity at its states of the model to be certified, where the trajectory is
            another's; by default that of the trajectory itself.

    With ν the velocity that moved the states, x_{k+1} = μ_ν + std ε, so that for any model

        log N_β/N_θ = ½‖u_θ‖² - u_θ·(ε + u_ν),   u = mean_v (v - v_β)/std:

    differentiable in ``v`` at fixed states.
    """
    noisy = kernel.steps - int(kernel.noiseless_last)
    u_sampled = _whitened_drift(trajectory, trajectory.v, v_base, kernel, noisy)
    u = u_sampled if v is None else _whitened_drift(trajectory, v, v_base, kernel, noisy)
    kl = 0.5 * u.square().sum((0, 2))
    cross = (u * (trajectory.noise[:noisy].flatten(2) + u_sampled)).sum((0, 2))
    return kl - cross, kl


def _whitened_drift(
    trajectory: Trajectory, v: Tensor, v_base: Tensor, kernel: Kernel, noisy: int
) -> Tensor:
    """Return the control in units of the noise, u_k = L_k⁻¹ mean_v (v - v_β), (noisy, B, d)."""
    difference = (v - v_base)[:noisy].flatten(2)
    if trajectory.roots is None:
        ratio = (kernel.mean_v[:noisy] / kernel.std[:noisy]).to(v_base.dtype)
        return ratio.reshape(-1, 1, 1) * difference
    d = kernel.mean_v.to(v_base.dtype).reshape(-1, 1, 1) * difference
    return torch.linalg.solve_triangular(trajectory.roots, d.unsqueeze(3), upper=False).squeeze(3)


@dataclass(frozen=True)
class Certificate:
    """Samples of the tilted chain with their log-weights, and what follows from them.

    Attributes:
        samples: (N, *) ends of the trajectories.
        rewards: (N,) r at the samples; where a temperature T was given to `tilt`, r / T.
        log_weights: (N,) log w.
        path_kls: (N,) Σ‖d_k‖²/(2 std_k²); their mean bounds KL(tilted ‖ base).
        groups: number of equal groups of neighbours, each under one condition.
    """

    samples: Tensor
    rewards: Tensor
    log_weights: Tensor
    path_kls: Tensor
    groups: int = 1

    @property
    def grouped(self) -> Tensor:
        """Return log-weights (groups, N / groups), float64."""
        return self.log_weights.double().reshape(self.groups, -1)

    @property
    def weights(self) -> Tensor:
        """Return importance weights (N,) that sum to 1, and to an equal part in each group."""
        return torch.softmax(self.grouped, 1).flatten() / self.groups

    @property
    def log_weight_std(self) -> float:
        """Return the standard deviation of log w within groups, which is 0 at the exact tilt."""
        return float(self.grouped.var(1).mean().sqrt())

    @property
    def log_z(self) -> float:
        """Return the estimate of log Z = log E_β[e^r] over the base's chain.

        With several groups it is the mean of log Z over them.  The log Z of the base's ODE is
        another number; see `adjoint.judgement`.
        """
        return log_mean_exp(self.grouped)[0]

    @property
    def log_z_stderr(self) -> float:
        """Return the standard error of the chain's log Z, by the delta method.

        It is the relative standard error of mean w, for the conditions at hand where there are
        several.  It holds the sampling error alone, not how the chain differs from the base's ODE.
        Infinite below `ENOUGH` effective samples (in the typical group).
        """
        return log_mean_exp(self.grouped)[1]

    @property
    def ess(self) -> float:
        """Return the effective sample size / N, in (0, 1]; the harmonic mean over groups."""
        return log_mean_exp(self.grouped)[2]

    @property
    def path_kl(self) -> float:
        """Return the mean path KL in nats."""
        return float(self.path_kls.double().mean())

    @property
    def reward(self) -> float:
        """Return the mean reward of the samples."""
        return float(self.rewards.double().mean())

    def weighted_mean(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean of ``values`` (N, ...) under the exact tilt, and its standard error.

        Over groups it is the mean over their conditions, and the error holds how these differ.  The
        error is infinite below `ENOUGH` effective samples (in the typical group): then do not trust
        the mean either.

        Raises:
            TypeError, ValueError: no tensor, or not one value (of any shape) for each sample.
        """
        if not isinstance(values, Tensor):
            raise TypeError(f"values must be a tensor, got {type(values).__name__}")
        if values.shape[:1] != self.log_weights.shape:
            raise ValueError(
                f"values must have the leading size {len(self.log_weights)} of the samples, got "
                f"shape {tuple(values.shape)}"
            )
        values = values.double()
        weights = self.weights.reshape(-1, *([1] * (values.ndim - 1)))
        mean = (weights * values).sum(0)
        if self.ess * len(values) < ENOUGH * self.groups:
            return mean, torch.full_like(mean, math.inf)
        if self.groups == 1:
            return mean, (weights * (values - mean)).square().sum(0).sqrt()
        means = self.groups * (weights * values).unflatten(0, (self.groups, -1)).sum(1)
        return mean, means.std(0) / math.sqrt(self.groups)

    def resample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Return ``n`` samples (n, *) of the exact tilt, drawn from the chain's with their weights.

        Systematic resampling: a sample of weight w occurs n w times, rounded up or down, so that
        frequencies are those of `weighted_mean` to within 1/n a sample.  Samples repeat: for an
        estimate they are worth about ``ess`` · N independent ones.  In random order.

        Arguments:
            generator: on the device of the samples.

        Raises:
            ValueError: ``n`` is not positive, or log-weights are NaN or infinite.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        weights = self.weights
        if not bool(weights.isfinite().all()):
            raise ValueError("log-weights are NaN or infinite: look at the reward at the samples")
        device = weights.device
        start = torch.rand(1, generator=generator, dtype=weights.dtype, device=device)
        ticks = (torch.arange(n, dtype=weights.dtype, device=device) + start) / n
        index = torch.searchsorted(weights.cumsum(0), ticks).clamp_max(len(weights) - 1)
        return self.samples[index[torch.randperm(n, generator=generator, device=device)]]

    def summary(self) -> dict[str, float]:
        """Return the numbers of a report; ``log_z_stderr`` may be infinite, which JSON has not."""
        return {
            "reward": self.reward,
            "log_z": self.log_z,
            "log_z_stderr": self.log_z_stderr,
            "log_weight_std": self.log_weight_std,
            "ess": self.ess,
            "path_kl": self.path_kl,
        }


def certify(
    field: VelocityField | Evaluator,
    base: VelocityField | Evaluator,
    reward: ValueFunction,
    kernel: Kernel,
    x0: Tensor,
    *,
    cond: Cond | None = None,
    groups: int = 1,
    batch_size: int = 4096,
    generator: torch.Generator | None = None,
    progress: bool = False,
    description: str = "certificate",
) -> Certificate:
    """Return the certificate of ``field`` as the tilt of ``base`` by ``reward``.

    With several processes, x0 are the starts of this one, N in each, and the result is of all.

    Arguments:
        field: tilted velocity; the base itself gives the certificate "before".
        x0: standard normal starts.
        cond: conditions with leading size N.
        groups: number of equal groups of neighbours that have the same conditions.
        batch_size: trajectories at a time.
        generator: of the step noise, on the device of x0.
        progress: show a bar.
        description: of what the bar shows the progress.

    Raises:
        ValueError: N starts are not ``groups`` equal groups.
    """
    if groups < 1 or len(x0) % groups:
        raise ValueError(f"groups must divide the {len(x0)} starts, got {groups}")
    starts = chunks(len(x0), batch_size)
    parts = [
        certify_batch(field, base, reward, kernel, x0[i], rows_of(cond, i), generator=generator)
        for i in tqdm(starts, desc=description, disable=not progress, leave=False)
    ]

    def joined(name: str) -> Tensor:
        return distributed.gather(torch.cat([getattr(part, name) for part in parts]))

    return Certificate(
        joined("samples"),
        joined("rewards"),
        joined("log_weights"),
        joined("path_kls"),
        1 if groups == 1 and cond is None else groups * distributed.size(),
    )


@torch.no_grad()
def certify_batch(
    field: VelocityField | Evaluator,
    base: VelocityField | Evaluator,
    reward: ValueFunction,
    kernel: Kernel,
    x0: Tensor,
    cond: Cond | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Certificate:
    """Return the certificate that `certify` makes, from one batch of starts of this process."""
    field, base = Evaluator.of(field), Evaluator.of(base)
    noise = draw_noise(kernel, x0, generator=generator)
    trajectory = rollout(field, base, kernel, x0, noise, cond)
    if field.field is base.field:
        v_base = trajectory.v
    else:
        times, states = kernel.t.to(x0.dtype), trajectory.xs[:-1]
        v_base = torch.stack([base.at(x, times[k], cond) for k, x in enumerate(states)])
        v_base = v_base.to(x0.dtype)
    log_ratio, kl = path_log_ratio(trajectory, v_base, kernel)
    value = as_reward(reward)(trajectory.xs[-1], cond)
    return Certificate(trajectory.xs[-1], value, value + log_ratio, kl)
