"""Options of a tilt: the chain, the loss, and what a device can hold."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, get_args

import torch

from adjoint.chain.kernels import Scheme, find_scheme
from adjoint.loss import select_steps
from flows import grid as grids
from flows.training import TrainerConfig
from flows.training.config import plain_options
from flows.training.renamed import Renamed


def option(default: Any, *, resume: str = "fixed") -> Any:
    """Return a field of `TiltConfig` with its default value.

    Arguments:
        resume: "free" where a resumed run may change the option: the numbers of the training stay
            as they are, up to rounding.  A resume with another value of a "fixed" option is
            refused.
    """
    return field(default=default, metadata={"resume": resume})


RefineLoss = Literal["auto", "flow_matching", "log_variance"]
REFINE_LOSSES = get_args(RefineLoss)


@dataclass(frozen=True)
class TiltConfig(TrainerConfig):
    """Options of a tilt; the options of `flows.training.TrainerConfig` come first."""

    renamed: ClassVar[Renamed] = {
        "refine": "refine_fraction",
        "late": "late_fraction",
        "early": "early_fraction",
        "variates": "control_variates",
        "replay": "replay_size",
        "refresh": "losses_per_rollout",
        "graph": "cuda_graphs",
        "probe_samples": "base_samples",
        "max_batch": "eval_batch_size",
    }
    """New names of options by their names in version 0.1."""
    iterations: int = 1500
    """Optimiser steps."""
    lr: float = 2e-3
    """Learning rate, the highest of the schedule."""
    warmup: int = 20
    """Iterations over which the rate rises linearly."""
    ema_decay: float = 0.995
    """Decay of the average of the weights; 0 turns averaging off."""
    grad_clip: float = 100.0
    """Largest norm of the gradient; 0 turns clipping off.  The loss is a sum over steps, and its
    rare large terms carry the mass between modes: a tight limit would bias the tilt."""
    checkpoint_every: int = option(500, resume="free")
    """Iterations between two checkpoints."""
    kernel: str | Scheme = "moment_matched"
    """Scheme of the memoryless chain: a name of adjoint.KERNELS, or a `Scheme` of your own."""
    steps: int = 20
    """Number of steps K of the training chain."""
    shift: float = 1.0
    """Shift of the time grid; 1 is uniform, above 1 puts more steps near the noise, as the
    samplers of SD3 do (Esser et al. 2403.03206, eq. 23)."""
    refine_fraction: float = 0.7
    """Fraction of the updates, the last ones, that refine the tilt with the loss ``refine_loss``
    instead of adjoint matching.  They start from the averaged weights with a fresh optimiser; 0 is
    none.  ``clip``, ``importance``, ``control_variates`` and ``replay_size`` have an effect on them
    only where "auto" goes on with adjoint matching."""
    refine_loss: RefineLoss = "auto"
    """Loss of these updates.  "flow_matching" fits the velocity to samples of the exact tilt, drawn
    by their weights among trajectories of the model (`adjoint.flow_matching_loss`); "auto" does so
    where these samples know the tilt better than the model and a mode is still to be decided, and
    else goes on with adjoint matching.
    "log_variance" minimises the variance of log w (`adjoint.variance_loss`): a good loss in low
    dimensions, and too noisy a one in many, where log w varies by a nat or so."""
    refine_steps: int | None = None
    """Number of steps of the chain that the refinement rolls out and that is certified.  None is
    eight times ``steps``, or fewer for a costly base, and ``steps`` for "log_variance".  No adjoint
    is computed on it."""
    refine_kernel: str | Scheme | None = None
    """Scheme of this chain.  None is ``kernel``, but ``covariance_matched`` instead of
    ``moment_matched`` for samples of up to 3 entries, but for "log_variance": it enters rare modes
    as the flow does."""
    refine_samples: int | None = None
    """Trajectories that flow matching draws its samples from, 64 under each condition; they are
    drawn twice.  A total over the processes.  None is 16384, or fewer for a costly base or a short
    training."""
    temperature: float = 1.0
    """Temperature T of the target p(x) exp(r(x) / T)."""
    batch_size: int = 128
    """Trajectories in an update (in one loss, where ``accumulate`` adds several).  This number,
    ``replay_size``, ``base_samples`` and ``certificate_samples`` are totals over the processes and
    are rounded up to a multiple of their number."""
    late_fraction: float = 1.0
    """Fraction of the steps, the last ones, that always enter the loss.  The published tilt of
    images takes a quarter (Domingo-Enrich et al. 2409.08861, appendix G.2)."""
    early_fraction: float = 1.0
    """Fraction of the other steps, drawn at random, that enter the loss.  The published tilt of
    images takes a third."""
    clip: float = 0.0
    """Constant cap on the loss of one step of one trajectory; 0 is none.  The published tilt of
    images has one, in proportion to 1/T² (Domingo-Enrich et al. 2409.08861, appendix G.3)."""
    clip_quantile: bool = False
    """Cap these losses at a running mean of their 0.9 quantile instead, the threshold above which
    the authors' code for Stable Diffusion (soc-fine-tuning-sd) drops them."""
    importance: bool = False
    """Weight trajectories by softmax(log w).  It removes bias that a coarse grid leaves, and adds
    noise: choose large batches.  With conditions, w contains Z(c), so that conditions with a large
    Z(c) count more; where Z(c) varies much, ``min_ess`` leaves batches unweighted."""
    control_variates: bool = False
    """Subtract control variates from the adjoints (`adjoint.chain.control_variates`).  Their
    variance falls as the model improves.  The price is a second adjoint pass and more evaluations
    of model and base per update."""
    min_ess: float = 0.5
    """With ``importance``, the effective sample size / B below which a batch goes unweighted.  The
    tilts of digits set it (`applications.toy2d`, `benchmarks.digits`)."""
    replay_size: int = 0
    """Trajectories kept for reuse; 0 is none.  The authors' code for Stable Diffusion
    (soc-fine-tuning-sd) and Adjoint Sampling (Havens et al. 2504.11713) train from a buffer."""
    losses_per_rollout: int = 1
    """With ``replay_size``, the number of losses per fresh rollout; 10 in soc-fine-tuning-sd."""
    base_samples: int | None = None
    """ODE samples drawn from the base before training, to estimate its mean squared errors, to
    check the reward, and to estimate log Z.  None is 8192, or fewer for a base whose evaluation
    costs more than half a million operations a state (`adjoint.cost`)."""
    certificate_samples: int | None = option(None, resume="free")
    """Trajectories of each of the two certificates, 64 under each condition; 0 is none.  None is
    4096, or fewer for a costly base."""
    eval_batch_size: int | None = option(None, resume="free")
    """Samples or trajectories that one process evaluates at a time before and after training.  None
    is 4096, or fewer for samples of more than 64 entries.  The refinement draws its samples as many
    at a time: a run that is resumed with another number before that draws other ones."""
    micro_batch: int = option(0, resume="free")
    """States at which base or model are evaluated at a time, always; 0 is all.  The loss then
    evaluates the model twice, the second time in its backward pass."""
    reward_batch: int = option(0, resume="free")
    """Samples at which the reward and its gradient are evaluated at a time; 0 is all."""
    offload: bool = option(False, resume="free")
    """Keep trajectories, adjoints and velocities on the CPU while base and model are elsewhere."""
    compile: bool = option(False, resume="free")
    """Compile base and model for the updates with `torch.compile` (on a CPU with a C++ compiler).
    It takes from seconds to a minute before the first update, which only long trainings earn
    back."""
    cuda_graphs: bool = option(False, resume="free")
    """On cuda, record loss and gradient once as a CUDA graph and launch it for each update
    (`flows.training.gradient_graph`).  It serves small networks, whose kernels end sooner than the
    host asks for the next one.  Base, reward and cond_sampler must not wait for the GPU, must do
    the same work at each call, and must draw random numbers from the generator only, which a
    `Reward` with smoothing does not.  Your own trainer takes
    `flows.training.GradientGraph` as its ``backward``."""

    @property
    def chain_steps(self) -> int:
        """Return the number of steps of the chain that training ends with and that is certified."""
        refining = self.refine_from is not None and self.refine_from < self.iterations
        return self.refine_steps if self.refine_steps and refining else self.steps

    @property
    def chain_kernel(self) -> str | Scheme:
        """Return the scheme of the chain that training ends with and that is certified."""
        refining = self.refine_updates > 0
        return self.refine_kernel if self.refine_kernel is not None and refining else self.kernel

    @property
    def refine_updates(self) -> int:
        """Return the number of updates of the refinement."""
        return 0 if self.refine_from is None else self.iterations - self.refine_from

    @property
    def refine_from(self) -> int | None:
        """Return the iteration with which the refinement begins; None without one."""
        if not self.refine_fraction:
            return None
        return self.iterations - round(self.refine_fraction * self.iterations)

    def fixed_options(self) -> dict[str, Any]:
        """Return the options that a resumed run must share with its checkpoint, by name."""
        free = {f.name for f in fields(self) if f.metadata.get("resume") == "free"}
        return {name: value for name, value in plain_options(self).items() if name not in free}

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            ValueError: naming the option, its value and what was expected.
        """
        super().__post_init__()
        scheme = find_scheme(self.kernel)
        minima = {"steps": 2, "batch_size": 1, "losses_per_rollout": 1, "replay_size": 0}
        minima |= {"certificate_samples": 0, "base_samples": 64, "eval_batch_size": 1}
        minima |= {"micro_batch": 0, "reward_batch": 0, "refine_steps": 2, "refine_samples": 64}
        for name, least in minima.items():
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, numbers.Integral) or isinstance(value, bool):
                raise TypeError(f"{name} must be of type int or None, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
            object.__setattr__(self, name, int(value))
        if not 0 <= self.refine_fraction <= 1:
            raise ValueError(f"refine_fraction must lie in [0, 1], got {self.refine_fraction}")
        for steps in (self.steps, self.chain_steps):
            grids.shifted(steps, self.shift)
            select_steps(
                steps,
                late_fraction=self.late_fraction,
                early_fraction=self.early_fraction,
                generator=torch.Generator(),
            )
        if not 0 <= self.min_ess <= 1:
            raise ValueError(f"min_ess must lie in [0, 1], got {self.min_ess}")
        if self.refine_loss not in REFINE_LOSSES:
            raise ValueError(
                f"refine_loss must be one of {', '.join(REFINE_LOSSES)}, got {self.refine_loss!r}"
            )
        if self.refine_fraction and self.refine_loss == "log_variance" and self.batch_size < 2:
            raise ValueError(
                "batch_size must be at least 2 where refine_loss='log_variance' compares "
                f"trajectories, got {self.batch_size}"
            )
        if self.refine_kernel is not None:
            find_scheme(self.refine_kernel)
        for name in ("refine_steps", "refine_kernel", "refine_samples"):
            if getattr(self, name) is not None and not self.refine_fraction:
                raise ValueError(
                    f"{name} must be None where refine_fraction is 0, got {getattr(self, name)}"
                )
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")
        if not self.clip >= 0 or (self.clip and self.clip_quantile):
            raise ValueError(
                "clip must be at least 0, and 0 where clip_quantile is on, "
                f"got clip={self.clip}, clip_quantile={self.clip_quantile}"
            )
        if self.control_variates and (self.clip or self.clip_quantile):
            raise ValueError(
                "control_variates must be False where clip or clip_quantile caps the loss: under "
                "a cap the mean of what they subtract would not be zero"
            )
        if 0 < self.replay_size < self.batch_size:
            raise ValueError(
                f"replay_size must be 0 or at least batch_size={self.batch_size}, "
                f"got {self.replay_size}"
            )
        if self.losses_per_rollout > 1 and not self.replay_size:
            raise ValueError(
                f"losses_per_rollout={self.losses_per_rollout} needs a replay buffer, "
                "got replay_size=0"
            )
        if self.compile and scheme.state_noise:
            raise ValueError(
                f"compile must be False with kernel {scheme.name!r}, which differentiates the "
                "base twice: compiled functions have first derivatives only"
            )
        recorded = {"replay_size": 0, "clip_quantile": False, "micro_batch": 0, "offload": False}
        for name, value in recorded.items():
            if self.cuda_graphs and getattr(self, name) != value:
                raise ValueError(
                    f"{name} must be {value} where cuda_graphs records the updates, "
                    f"got {getattr(self, name)}"
                )
        if self.cuda_graphs and scheme.state_noise:
            raise ValueError(
                f"cuda_graphs must be False with kernel {scheme.name!r}, whose factorisations the "
                "host waits for"
            )
        if self.certificate_samples == 1:
            raise ValueError("certificate_samples must be 0 or at least 2, got 1")
