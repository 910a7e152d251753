r"""Peers train a tilt in other ways, with the evaluations that the call without options takes.

euler_published
    the published pair of adjoint matching (Domingo-Enrich et al. 2409.08861).
log_variance
    the variance of log w as the only loss (Nüsken and Richter 2005.05409), which for a tilt of a
    chain is trajectory balance (Malkin et al. 2201.13259) with log Z estimated by the batch.
adjoint_sampling
    states by noising the ends of buffered trajectories (Havens et al. 2504.11713), derived here for
    any pretrained base.

Adjoint sampling for a pretrained base.  Let Q(· | x_1) be the noising process, the Markov process
backward in time with Q(x_t | x_1) = N(t x_1, (1-t)² I).  Its time reversal from x_1 ~ p_1 is the
memoryless process P of the base: the noising process is dx = -(x/t) dτ + √(2(1-t)/t) dB in
τ = 1 - t, its reversal has the drift x/t + 2(1-t)/t ∇log p_t(x), and with
∇log p_t = (t v_β - x)/(1-t) this is 2 v_β - x/t.  So

    P(path) = p_1(x_1) Q(path | x_1),
    P*(path) = P(path) e^{r(x_1)} / Z = p*_1(x_1) Q(path | x_1):

base and tilt share the conditional of a path given its end, and it is Gaussian whatever the base
is.  (Havens et al. have P without data, where Q is a Brownian bridge.  Of a general diffusion the
conditional given x_1 is not known; it is for the flow of a path x_t = t x_1 + (1-t) x_0.)

The optimal velocity is v* = v_β - (1-t) E*[c_t | X_t = x], where the lean adjoint c = a/t solves
dc/dt = -2 (∇v_β)ᵀ c along the path, from c_1 = -∇r(x_1).  The expectation is over paths of P*
through x, so that paths may be drawn as one likes as long as they have the distribution P*.
Adjoint matching takes those of the model.  Adjoint sampling keeps only their ends x_1 with ∇r(x_1)
and draws the rest from Q(· | x_1): at the optimum, where the ends have the distribution p*_1, these
are paths of P*, so that the optimum is a fixed point.  The adjoint at x_t depends on the path
between x_t and x_1 through ∇v_β.  Where there is no data it does not, and one state and one end
are enough; here the noising chain

    x_k = (t_k/t_{k+1}) x_{k+1} + √((1-t_k)² - (t_k/t_{k+1})² (1-t_{k+1})²) ε_k

is drawn at all times of the grid, which has the exact marginals on any grid, and the adjoint is
carried along it by the rule of the own-time kernels.  What remains is the error of that rule on a
grid of K steps.  By quadrature with exact ends, on the problems A to D of `benchmarks.fixed_points`
(D has narrow modes), the velocity error is

    K = 20     .131  .014  .308  .65
    K = 40     .091  .007  .145  .64
    K = 80     .049  .003  .055  .62
    K = 160    .020  .001  .017  .58

It falls toward 0, but is larger than on the chain's own states, with which the rule shares its
error (.013, .002 and .031 at K = 20 on A, B and C).  So the grid has 80 steps, and a batch a
quarter of the trajectories, for the work of 256 trajectories in 20 steps.

What is gained is the reuse of ends: each serves `REUSE` updates with new paths, and an update costs
B K (2 + 1/`REUSE`) evaluations, where fresh trajectories need 3 B K.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from adjoint import (
    Kernel,
    TiltConfig,
    Tilted,
    adjoint_matching_loss,
    draw_noise,
    estimate_cost,
    lean_adjoint,
    rollout,
    tilt,
    velocity_along,
)
from adjoint.arguments import Arguments, check_arguments
from adjoint.certify_tilt import certify_tilt
from adjoint.models.trainable import trainable
from adjoint.preparation import prepare_tilt
from benchmarks.common.problems import Problem
from flows.training import Loss, Trainer

Method = Callable[[Problem, int, int], Tilted]
"""Function (problem, seed, evaluations) -> tilted flow."""

STEPS = 20
"""Steps of the chain, but for adjoint sampling."""
SAMPLING_STEPS = 80
"""Steps of the chain and of the noising chain in adjoint sampling."""
REUSE = 4
"""Updates that adjoint sampling takes for each batch of new ends."""
CAPACITY = 64
"""Batches of ends that its buffer holds."""

PUBLISHED = TiltConfig(kernel="euler_published", steps=STEPS, refine_fraction=0.0)
LOG_VARIANCE = TiltConfig(
    kernel="moment_matched", steps=STEPS, refine_fraction=1.0, refine_loss="log_variance"
)
SAMPLING = TiltConfig(
    kernel="moment_matched", steps=SAMPLING_STEPS, batch_size=64, refine_fraction=0.0
)


def by_options(config: TiltConfig, per_trajectory: float) -> Method:
    """Return the method that calls `adjoint.tilt` with the options of a peer.

    Arguments:
        config: options of the peer.
        per_trajectory: evaluations of base and model that a trajectory takes in an update.
    """

    def run(problem: Problem, seed: int, evaluations: int) -> Tilted:
        options = within(problem, replace(config, seed=seed), evaluations, per_trajectory)
        return tilt(problem.base, problem.reward, shape=(problem.dim,), config=options)

    return run


def adjoint_sampling(problem: Problem, seed: int, evaluations: int) -> Tilted:
    """Tilt a problem by adjoint sampling; see the module docstring."""
    per_trajectory = SAMPLING_STEPS * (2 + 1 / REUSE) + 1
    options = within(problem, replace(SAMPLING, seed=seed), evaluations, per_trajectory)
    arguments = check_arguments(
        problem.base,
        problem.reward,
        shape=(problem.dim,),
        config=options,
        model=None,
        cond_sampler=None,
        callbacks=(),
        checkpoint=None,
        resume=False,
        device=None,
        dtype=torch.float32,
    )
    preparation = prepare_tilt(arguments)
    model = trainable(arguments.base, arguments.shape, seed)
    loss = AdjointSamplingLoss(arguments, preparation.kernel)
    return certify_tilt(arguments, preparation, Trainer(model, loss, options).fit())


def within(
    problem: Problem, config: TiltConfig, evaluations: int, per_trajectory: float
) -> TiltConfig:
    """Return the options with as many updates as a number of evaluations allows, one at least.

    Arguments:
        problem: problem that is tilted.
        config: options of the peer.
        evaluations: evaluations of base and model in all, with those before and after training.
        per_trajectory: evaluations that a trajectory takes in an update.
    """
    cost = estimate_cost(problem.base, shape=(problem.dim,), config=config)
    updates = (evaluations - cost.before - cost.after) / (config.batch_size * per_trajectory)
    return replace(config, iterations=max(1, round(updates)))


class AdjointSamplingLoss(Loss):
    """The regression of adjoint sampling, on noised ends of buffered trajectories.

    Arguments:
        arguments: checked arguments of the tilt.
        kernel: own-time kernel of the trajectories and of the adjoint.
    """

    def __init__(self, arguments: Arguments, kernel: Kernel) -> None:
        self.base, self.reward = arguments.base, arguments.reward
        self.shape, self.kernel = arguments.shape, kernel
        self.batch_size = arguments.config.batch_size
        self.ends: list[tuple[Tensor, Tensor]] = []

    def __call__(
        self, module: nn.Module, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of ``module`` on one batch of noised ends, and metrics."""
        if self.calls % REUSE == 0:
            self.ends = [*self.ends, self.fresh_ends(module, generator)][-CAPACITY:]
        self.calls += 1
        ends, gradients = (torch.cat(parts) for parts in zip(*self.ends, strict=True))
        index = torch.randint(len(ends), (self.batch_size,), generator=generator)
        xs = noised(ends[index], self.kernel.t, generator)
        adjoint = lean_adjoint(self.base, self.kernel, xs, -gradients[index])
        v = velocity_along(module, xs[:-1], self.kernel.t[:-1])
        return adjoint_matching_loss(v, adjoint, self.kernel)

    def fresh_ends(self, module: nn.Module, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return ends of new trajectories of ``module`` and the reward's gradients there."""
        x0 = torch.randn(self.batch_size, *self.shape, generator=generator)
        noise = draw_noise(self.kernel, x0, generator=generator)
        ends = rollout(module, self.base, self.kernel, x0, noise).xs[-1]
        return ends, self.reward.value_and_gradient(ends)[1]


def noised(ends: Tensor, grid: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return states (K+1, B, *) of the noising chain from ``ends`` (B, *) at the times ``grid``."""
    states = [ends]
    times = grid.tolist()
    for t, s in zip(times[-2::-1], times[:0:-1], strict=True):
        ratio = t / s
        std = ((1 - t) ** 2 - (ratio * (1 - s)) ** 2) ** 0.5
        noise = torch.randn(ends.shape, generator=generator, dtype=ends.dtype)
        states.append(ratio * states[-1] + std * noise)
    return torch.stack(states[::-1])


PEERS: dict[str, Method] = {
    "euler_published": by_options(PUBLISHED, 4 * STEPS),  # its products are not at its own times
    "log_variance": by_options(LOG_VARIANCE, 3 * STEPS),
    "adjoint_sampling": adjoint_sampling,
}
"""Peers by name."""
