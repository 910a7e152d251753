"""All methods on one problem of the frontier of digits; see `benchmarks.digits_frontier`."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from adjoint import AbstractReward, TiltConfig, Tilted, lora, tilt
from applications.common.callbacks import training_callbacks
from applications.toy2d.digits.data import DIM
from applications.toy2d.digits.unet_flow import draw_labels, with_correction
from applications.toy2d.exact_tilt import resample_tilt
from benchmarks.digits_frontier import config as frontier_config
from benchmarks.digits_frontier.alternatives import RewardGuidance, backpropagate, best_of
from benchmarks.digits_frontier.distributions import (
    SampleSet,
    certificate_summary,
    compare_with_exact,
    sample_chain,
    sample_ode,
    start,
)
from benchmarks.digits_frontier.kl import best_of_kl, ode_kl, tilt_kl
from benchmarks.digits_frontier.metrics import CLOSENESS
from benchmarks.digits_frontier.rewards import make_rewards
from benchmarks.digits_frontier.rows import Point, Row
from benchmarks.digits_frontier.study import Study

IMAGES = 96
"""Number of samples stored for each point, for the pictures."""


class Runs:
    """All methods on one problem; each returns its points in the order of their strengths."""

    def __init__(self, study: Study, name: str) -> None:
        self.study, self.config, self.name = study, study.config, name
        self.problem = frontier_config.PROBLEMS[name]
        self.reward: AbstractReward = make_rewards(study.classifier, study.config.digit)[
            self.problem.reward
        ]
        self.labelled = self.problem.labelled
        self.model = "guided" if self.labelled else "plain"

    @cached_property
    def base(self) -> nn.Module:
        """The base flow, which is tilted."""
        return self.study.base(labelled=self.labelled)

    @cached_property
    def pool(self) -> SampleSet:
        """Samples of the base by its ODE."""
        config, name = self.config, f"pool-{self.model}-ode"

        def compute() -> dict[str, Any]:
            drawn = self.ode(self.base, config.base_samples, config.seed_of(name))
            return {"samples": drawn.samples, "labels": drawn.labels}

        stored = self.study.cached(name, config.identity("base_samples"), compute)
        return SampleSet(stored["samples"], stored["labels"])

    def chain_pool(self, tilted: Tilted) -> SampleSet:
        """Return samples of the base by its chain, which all tilts of a base share."""
        config, name = self.config, f"pool-{self.model}-chain"

        def compute() -> dict[str, Any]:
            drawn, _ = sample_chain(
                tilted.base,
                tilted.base,
                self.reward,
                tilted.kernel,
                config.base_samples,
                labelled=self.labelled,
                seed=config.seed_of(name),
            )
            return {"samples": drawn.samples, "labels": drawn.labels}

        identity = config.identity("base_samples", "kernel", "steps")
        stored = self.study.cached(name, identity, compute)
        return SampleSet(stored["samples"], stored["labels"])

    def ode(self, velocity: Any, n: int, seed: int) -> SampleSet:
        """Draw ``n`` samples by the ODE of a velocity field."""
        steps = self.config.ode_steps
        return sample_ode(velocity, n, labelled=self.labelled, steps=steps, seed=seed)

    def ode_and_kl(self, velocity: Any, seed: int) -> tuple[SampleSet, Tensor, Row]:
        """Draw samples by the ODE of a velocity field, and measure their KL to the base by batch.

        The row holds the error of the KL of the first batch, against twice as many steps.
        """
        config = self.config
        drawn = self.ode(velocity, config.samples, seed)
        kl, finer = (
            ode_kl(
                velocity,
                self.base,
                some,
                batch=config.batch,
                steps=steps,
                probes=config.kl_probes,
                seed=seed,
            )
            for some, steps in (
                (drawn, config.ode_steps),
                (drawn.first(config.batch), 2 * config.ode_steps),
            )
        )
        error = float(kl[0] - finer[0])
        return drawn, kl, {"kl_step_error": error} if math.isfinite(error) else {}

    def point(
        self,
        method: str,
        strength: float,
        compute: Callable[[], tuple[Tensor, Tensor, Row]],
        *options: str,
    ) -> Point:
        """Return the point of ``method`` at ``strength``, stored or computed.

        Arguments:
            compute: returns the samples, the KL to the base (by batch, or one for all batches) and
                further columns of the row.
            options: names of the options that the point depends on besides the shared ones.
        """

        def measured() -> dict[str, Any]:
            started = time.process_time()
            x, kl, more = compute()
            with torch.no_grad():
                metrics = self.study.metrics(x, self.reward(x))
            metrics[CLOSENESS] = kl.double().expand(len(metrics["reward"])).clone()
            seconds = {"cpu_seconds": time.process_time() - started}
            return {"row": more | seconds, "metrics": metrics, "images": x[:IMAGES].clone()}

        name = f"points/{self.name.replace(' ', '-')}-{method}-{strength:g}"
        stored = self.study.cached(name, self.config.identity("kl_probes", *options), measured)
        return Point(
            self.name, method, strength, stored["metrics"], stored["images"], stored["row"]
        )

    def unchanged(self) -> Point:
        """Return the point of the base itself."""
        n = self.config.samples

        def compute() -> tuple[Tensor, Tensor, Row]:
            return self.pool.samples[:n], torch.zeros(1), {}

        return self.point("base", 0, compute, "base_samples")

    def enough_for(self, n: int) -> bool:
        """Return whether the best of ``n``, under each label, fill two batches."""
        found = sum(len(part.samples) // n for part in self.pool.by_label())
        return found >= 2 * self.config.batch

    def best(self, n: int) -> Point:
        """Return the point of best-of-n; under labels, all ``n`` candidates have the same label."""

        def compute() -> tuple[Tensor, Tensor, Row]:
            chosen = []
            for part in self.pool.by_label():
                with torch.no_grad():
                    index = best_of(self.reward(part.samples), n)
                chosen.append(part.samples[index])
            x = torch.cat(chosen)
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(n))
            kl = torch.tensor(best_of_kl(n), dtype=torch.float64)
            return x[order][: self.config.samples], kl, {}

        return self.point("best_of_n", n, compute, "base_samples")

    def exact(self, temperature: float) -> Point:
        """Return the point of the exact tilt: resampled ODE samples of the base."""

        def compute() -> tuple[Tensor, Tensor, Row]:
            parts, config = self.pool.by_label(), self.config
            generator = torch.Generator().manual_seed(config.seed_of("exact"))
            drawn, rewards = [], []
            for part in parts:
                exact = resample_tilt(part.samples, self.reward.scaled(1 / temperature))
                drawn.append(exact.sample(-(-config.samples // len(parts)), generator))
                rewards.append(exact.rewards)
            x = torch.cat(drawn)
            order = torch.randperm(len(x), generator=generator)
            kl = tilt_kl(rewards, config.samples // config.batch)
            return x[order][: config.samples], kl, {}

        return self.point("exact", temperature, compute, "base_samples")

    def guidance(self, strength: float) -> Point:
        """Return the point of gradient guidance at sampling time."""
        seed = self.config.seed_of(f"{self.name} guidance {strength}")

        def compute() -> tuple[Tensor, Tensor, Row]:
            velocity = RewardGuidance(self.base, self.reward, strength)
            drawn, kl, more = self.ode_and_kl(velocity, seed)
            return drawn.samples, kl, more

        return self.point("guidance", strength, compute)

    def backpropagation(self, *, last_only: bool) -> list[Point]:
        """Return the points of reward backpropagation, one for each number of updates."""
        config = self.config
        method = "backprop_last" if last_only else "backprop_all"
        models: dict[int, nn.Module] = {}

        def train() -> None:
            for stop, model in backpropagate(
                self.base,
                self.reward,
                lambda n, generator: start(n, generator, labelled=self.labelled),
                last_only=last_only,
                stops=config.stops,
                steps=config.steps,
                batch_size=config.backprop_batch,
                lr=config.backprop_lr,
                seed=config.seed_of(f"{self.name} {method}"),
            ):
                models[stop] = copy.deepcopy(model).requires_grad_(False)

        def compute(stop: int) -> tuple[Tensor, Tensor, Row]:
            if not models:
                train()
            seed = config.seed_of(f"{self.name} {method} {stop}")
            drawn, kl, more = self.ode_and_kl(models[stop], seed)
            return drawn.samples, kl, more

        options = ("steps", "backprop_batch", "backprop_lr", "stops")
        return [self.point(method, stop, partial(compute, stop), *options) for stop in config.stops]

    def tilted(self, temperature: float, *, low_rank: bool) -> Point:
        """Return the point of a tilt, by a correction or by adapters, with its certificate."""
        config = self.config
        method = "tilt_lora" if low_rank else "tilt"
        name = f"{self.name.replace(' ', '-')}-{method}-{temperature:g}"

        def compute() -> tuple[Tensor, Tensor, Row]:
            result = self._tilt(temperature, name, low_rank=low_rank)
            drawn, kl, more = self.ode_and_kl(result.field, config.seed_of(name))
            return (
                drawn.samples,
                kl,
                more | self._certificate_and_classes(result, temperature, drawn),
            )

        training = ("iterations", "batch_size", "min_ess", "compile")
        shared = ("base_samples", "kernel", "steps", *training)
        own = ("lora_rank", "lora_lr") if low_rank else ("lr",)
        return self.point(method, temperature, compute, *shared, *own)

    def _tilt(self, temperature: float, name: str, *, low_rank: bool) -> Tilted:
        """Train the tilt, or resume it where it stopped."""
        config, base = self.config, self.base
        model: nn.Module
        if low_rank:
            model, base = lora(copy.deepcopy(base), rank=config.lora_rank, seed=config.seed)
        else:
            model = with_correction(base, labelled=self.labelled, seed=config.seed)
        options = TiltConfig(
            kernel=config.kernel,
            steps=config.steps,
            iterations=config.iterations or self.problem.iterations,
            batch_size=config.batch_size,
            lr=config.lora_lr if low_rank else config.lr,
            temperature=temperature,
            importance=True,
            min_ess=config.min_ess,
            warmup=0,
            ema_decay=0.99,
            refine_fraction=0.0,
            seed=config.seed,
            base_samples=min(2048, config.base_samples),
            certificate_samples=0,  # made later, with the labels
            checkpoint_every=100,
            compile=config.compile,
        )
        return tilt(
            base,
            self.reward,
            shape=(DIM,),
            config=options,
            model=model,
            cond_sampler=draw_labels if self.labelled else None,
            callbacks=training_callbacks(name, config.folder / f"{name}.csv"),
            checkpoint=config.folder / f"{name}.pt",
            resume=True,
            identity={"reward": self.problem.reward, "digit": config.digit},
        )

    def _certificate_and_classes(self, result: Tilted, temperature: float, ode: SampleSet) -> Row:
        """Return the columns of a tilt's certificate and of its class frequencies.

        Arguments:
            ode: samples of the tilt by its ODE.
        """
        config, scaled = self.config, self.reward.scaled(1 / temperature)
        (chain, after), (_, before) = (
            sample_chain(
                velocity,
                result.base,
                scaled,
                result.kernel,
                config.samples,
                labelled=self.labelled,
                seed=config.seed_of("certificate"),
            )
            for velocity in (result.field, result.base)
        )
        row: Row = {**certificate_summary(chain), "path_kl": after.path_kl}
        base_chain = self.chain_pool(result)
        untilted = SampleSet(before.samples, chain.labels, before.log_weights)
        summary = certificate_summary(untilted)
        row |= {f"{name}_base": summary[name] for name in ("log_weight_std", "ess")}
        kinds = {"ode": ode, "chain": chain, "weighted": chain}
        for kind, drawn in kinds.items():
            comparison = compare_with_exact(
                self.study.classifier,
                self.pool if kind == "ode" else base_chain,
                drawn,
                self.reward,
                temperature,
                weighted=kind == "weighted",
            )
            z = comparison.z.abs()
            row |= {
                f"within_{kind}": int((z <= 2).sum()),
                f"max_z_{kind}": float(z.max()),
                f"class_tv_{kind}": comparison.total_variation,
            }
            own = "log_z_ode" if kind == "ode" else "log_z_exact"
            row |= {
                own: comparison.resampled.log_z,
                f"{own}_stderr": comparison.resampled.log_z_stderr,
            }
        return row

    def points(self) -> list[Point]:
        """Return every point of the problem."""
        p, config = self.problem, self.config
        return [
            self.unchanged(),
            *(self.best(n) for n in config.candidates if self.enough_for(n)),
            *(self.exact(temperature) for temperature in sorted(p.temperatures, reverse=True)),
            *(self.guidance(strength) for strength in p.strengths),
            *self.backpropagation(last_only=True),
            *self.backpropagation(last_only=False),
            *(self.tilted(t, low_rank=False) for t in sorted(p.temperatures, reverse=True)),
            *(self.tilted(t, low_rank=True) for t in p.lora),
        ]
