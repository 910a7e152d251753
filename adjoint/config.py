"""Options of a tilt."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from adjoint.chain.kernels import KERNELS
from adjoint.loss import select_steps
from flows import grid as grids
from flows.training import TrainerConfig


@dataclass(frozen=True)
class TiltConfig(TrainerConfig):
    """Options of a tilt; those of the trainer come first."""

    grad_clip: float = 100.0
    """Largest norm of the gradient; 0 turns clipping off.  The loss is a sum over steps whose rare
    large terms carry the mass between modes: a tight limit would bias the tilt."""
    kernel: str = "moment_matched"
    """Memoryless scheme, one of adjoint.KERNELS."""
    steps: int = 20
    """Steps K of the training chain."""
    shift: float = 1.0
    """Shift of the time grid; 1 is uniform, above 1 puts more steps near the noise."""
    refine: float = 0.0
    """Fraction of the updates, the last ones, that minimise the variance of log w instead of the
    adjoint-matching loss, from the average and with a fresh optimiser; 0 is none.  For low
    dimensions: half or more, with 20 steps or more, or with the kernel ``covariance_matched``.  In
    many dimensions, where log w still varies by a nat or so, its noise is too large.  ``clip``,
    ``importance``, ``variates`` and ``replay`` are of the other updates."""
    refine_steps: int = 0
    """With refine: steps of the chain that those updates roll out, and that is certified; 0 is
    ``steps``.  No adjoint is needed there, and near the optimum part of the variance of log w is
    the error of the grid, which falls with the number of steps."""
    temperature: float = 1.0
    """The target is p(x) exp(r(x) / temperature)."""
    batch_size: int = 256
    """Trajectories an update (a micro-batch, where updates accumulate).  This, ``replay`` and the
    numbers of samples below are totals over the processes, rounded up to a multiple of theirs."""
    late: float = 1.0
    """Fraction of the steps, the last ones, that always enter the loss."""
    early: float = 1.0
    """Fraction of the other steps, drawn at random, that enter the loss."""
    clip: float = 0.0
    """Constant cap on the loss of one step of one trajectory; 0 is none."""
    clip_quantile: bool = False
    """Cap at a running mean of the 0.9 quantile of those losses instead."""
    importance: bool = False
    """Weight trajectories by softmax(log w): less bias of a coarse grid, more noise; wants large
    batches.  With conditions w holds Z(c): those of a large one then count more, and where Z(c)
    varies much, ``min_ess`` leaves batches unweighted."""
    variates: bool = False
    """Take from the adjoints what the model knows of their noise
    (`adjoint.chain.control_variates`): the better the model, the less noise is left, for a second
    adjoint pass and more evaluations an update."""
    min_ess: float = 0.5
    """With importance: batches whose effective sample size / B is smaller go unweighted."""
    replay: int = 0
    """Trajectories kept for reuse; 0 is none."""
    refresh: int = 1
    """With replay: losses per fresh rollout (updates, unless they accumulate)."""
    base_samples: int = 8192
    """ODE samples of the base that its mmse, the checks and the comparison of log Z are made of."""
    certificate_samples: int = 4096
    """Trajectories of each of the two certificates, 64 under each condition; 0 is none."""
    eval_batch_size: int = 4096
    """Trajectories or samples at a time in probe and certificates, of one process."""
    micro_batch: int = 0
    """States at which base or model are evaluated at a time, in training, probe and certificates;
    the loss then evaluates the model twice, the second time in its backward pass.  0 is all."""
    reward_batch: int = 0
    """Samples of which the reward and its gradient are computed at a time; 0 is all."""
    offload: bool = False
    """Keep trajectories, adjoints and velocities on the CPU; for another device than that."""
    compile: bool = False
    """Compile base and model for the updates (`torch.compile`, on a CPU with a C++ compiler):
    several seconds to a minute before the first, which only long trainings earn back."""
    graph: bool = False
    """On cuda, record loss and gradient once as a CUDA graph and launch that for each update
    (`flows.training.gradient_graph`): for small networks, whose kernels end sooner than the host
    asks for the next. Base, reward and sampler of conditions must not wait for the GPU, and must do
    the same at each call, with random numbers from the generator only: not so a `Reward` with
    smoothing.  A trainer of one's own takes `flows.training.GradientGraph` as its
    ``backward``."""

    @property
    def chain_steps(self) -> int:
        """Steps of the chain that training ends with, and that the certificate is of."""
        refining = self.restart is not None and self.restart < self.iterations
        return self.refine_steps if self.refine_steps and refining else self.steps

    @property
    def restart(self) -> int | None:
        """Iteration with which the refinement begins; None without one."""
        return self.iterations - round(self.refine * self.iterations) if self.refine else None

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            ValueError: naming the option, its value and what was expected.
        """
        super().__post_init__()
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {self.kernel!r}")
        minima = {"steps": 2, "batch_size": 1, "refresh": 1, "replay": 0}
        minima |= {"certificate_samples": 0, "base_samples": 64, "eval_batch_size": 1}
        minima |= {"micro_batch": 0, "reward_batch": 0}
        for name, least in minima.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for steps in (self.steps, self.chain_steps):
            grids.shifted(steps, self.shift)
            select_steps(steps, late=self.late, early=self.early, generator=torch.Generator())
        if not 0 <= self.min_ess <= 1:
            raise ValueError(f"min_ess must lie in [0, 1], got {self.min_ess}")
        if not 0 <= self.refine <= 1 or (self.refine and self.batch_size < 2):
            raise ValueError(
                "refine must lie in [0, 1], and batch_size be at least 2 where it is above 0, "
                f"got refine={self.refine}, batch_size={self.batch_size}"
            )
        if self.refine_steps and (self.refine_steps < 2 or not self.refine):
            raise ValueError(
                "refine_steps must be 0, or at least 2 where refine is above 0, "
                f"got refine_steps={self.refine_steps}, refine={self.refine}"
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")
        if not self.clip >= 0 or (self.clip and self.clip_quantile):
            raise ValueError(
                "clip must be at least 0, and 0 where clip_quantile is on, "
                f"got clip={self.clip}, clip_quantile={self.clip_quantile}"
            )
        if self.variates and (self.clip or self.clip_quantile):
            raise ValueError(
                "variates must be False where clip or clip_quantile caps the loss: what they take "
                "away would have a mean"
            )
        if 0 < self.replay < self.batch_size:
            raise ValueError(
                f"replay must be 0 or at least batch_size={self.batch_size}, got {self.replay}"
            )
        if self.refresh > 1 and not self.replay:
            raise ValueError(f"refresh={self.refresh} needs a replay buffer, got replay=0")
        if self.compile and self.kernel == "covariance_matched":
            raise ValueError(
                "compile must be False with kernel 'covariance_matched', which differentiates the "
                "base twice: compiled functions have first derivatives only"
            )
        recorded = {"replay": 0, "clip_quantile": False, "micro_batch": 0, "offload": False}
        for name, value in recorded.items():
            if self.graph and getattr(self, name) != value:
                raise ValueError(
                    f"{name} must be {value} where graph records the updates, "
                    f"got {getattr(self, name)}"
                )
        if self.graph and self.kernel == "covariance_matched":
            raise ValueError(
                "graph must be False with kernel 'covariance_matched', whose factorisations the "
                "host waits for"
            )
        if self.certificate_samples == 1:
            raise ValueError("certificate_samples must be 0 or at least 2, got 1")
