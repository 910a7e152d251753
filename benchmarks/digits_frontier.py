"""Reward against diversity on handwritten digits: the tilt beside the plain alternatives.

A small UNet flow of scikit-learn's digits is tilted toward three rewards at several temperatures
(`benchmarks.digit_rewards`: the log-probability of a digit, ink, and the symmetry of a decoded,
upscaled image); a second, class-conditional one under guidance toward ink. What is trained is a
perceptron added to the flow, or low-rank adapters in it (``tilt_lora``). On the same bases, and by
the same ODE sampler, stand the alternatives of `benchmarks.alternatives`, each at several
strengths, and the exact tilt by importance-resampling of the base. `benchmarks.frontier` says how
diversity is measured and what "at equal reward" means.

A row is one method at one strength (the temperature of a tilt, n of best-of-n, the weight of
gradient guidance, the updates of reward backpropagation).  Rows of tilts hold besides:

``log_weight_std``, ``ess``, ``path_kl``, ``log_z``
    the certificate; those of the base have the suffix ``_base``, ``log_z_exact`` is of the base's
    chain and ``log_z_ode`` of its ODE.  With labels they are means over the labels.
``within_*``, ``max_z_*``, ``class_tv_*``
    class frequencies against importance-resampled samples of the base, for the tilted ODE, the
    tilted chain, and that chain with its weights, each against the base's own law, as in
    `benchmarks.digits`: of the ten classes those within two standard errors, the largest deviation
    in standard errors, and the total variation.  Under guidance the samples of a label
    are nearly all of one class, and rare exceptions have no usable standard error: look at the
    variation there.
``METRIC_over_METHOD``
    the margin in diversity over a method at equal reward, with its standard error; absent where the
    method does not reach the reward.  ``at_least_METHOD`` says 1 where the margins of coverage and
    distance are not below minus two standard errors, 0 where one is, and -1 where the reward is not
    reached.  Rows of the exact tilt have them too: what it misses, no tilt can have.

Run: ``python -m benchmarks.digits_frontier``.  Everything that has been computed is kept in the
folder; a second call computes only what is missing.  Writes ``results/digits_frontier.json``, and
as figures beside it ``.png`` (the frontiers) and ``_images.png`` (examples).
"""

from __future__ import annotations

import copy
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from adjoint.lora import lora
from adjoint.reward import Reward
from adjoint.tilt import TiltConfig, Tilted, tilt
from applications.toy2d import handwriting
from applications.toy2d.digit_unet import draw_labels, fit_unet, guided, with_correction
from applications.toy2d.exact import resample_tilt
from applications.toy2d.handwriting import DIM, Classifier, Digits
from benchmarks import frontier_figure, frontier_rows
from benchmarks.alternatives import RewardGuidance, backpropagate, best_of
from benchmarks.digit_laws import Drawn, by_chain, by_ode, certificate_summary, compare_laws, start
from benchmarks.digit_rewards import make_rewards
from benchmarks.frontier import Judge
from benchmarks.frontier_rows import Point, Row
from flows import checkpoint as checkpoints
from flows.callbacks import Callback, CSVLogger, ProgressBar
from flows.checkpoint import write_json
from flows.process import prepare_process

IMAGES = 96
"""Samples kept of every point, for the pictures."""


SHARED = (
    *("seed", "widths", "base_iterations", "classifier_iterations", "guidance"),
    *("ode_steps", "samples", "batch", "digit"),
)
"""Options that every point depends on."""


@dataclass(frozen=True)
class Problem:
    """A base and a reward.

    Attributes:
        reward: name in `benchmarks.digit_rewards`.
        labelled: the class-conditional base under guidance instead of the plain one.
        temperatures, lora: of the tilts by a correction and by adapters.
        strengths: of gradient guidance.
        iterations: updates of a tilt.
    """

    reward: str
    labelled: bool
    temperatures: tuple[float, ...]
    lora: tuple[float, ...]
    strengths: tuple[float, ...]
    iterations: int


PROBLEMS = {
    "digit": Problem("digit", False, (2, 4, 8), (4,), (0.125, 0.25, 0.5, 1), 800),
    "ink": Problem("ink", False, (1, 2), (1,), (0.25, 0.5, 1, 2), 400),
    "symmetry": Problem("symmetry", False, (1, 2), (), (0.25, 0.5, 1, 2), 400),
    "guided ink": Problem("ink", True, (1, 2), (), (0.25, 0.5, 1), 400),
}


@dataclass(frozen=True)
class FrontierConfig:
    """Reward against diversity of tilted digits and of the alternatives."""

    problems: tuple[str, ...] = tuple(PROBLEMS)
    """Which of PROBLEMS."""
    digit: int = 3
    """The digit whose log-probability is a reward."""
    kernel: str = "moment_matched"
    """Memoryless scheme."""
    steps: int = 16
    """Steps K of the chain, and Euler steps of reward backpropagation."""
    iterations: int = 0
    """Updates of each tilt; 0 is the number that PROBLEMS has."""
    batch_size: int = 192
    """Trajectories an update."""
    lr: float = 1e-3
    """Learning rate of the tilts."""
    lora_rank: int = 8
    """Rank of the adapters."""
    lora_lr: float = 4e-3
    """Learning rate of the adapters."""
    min_ess: float = 0.2
    """Effective sample size / B from which trajectories are weighted."""
    guidance: float = 1.5
    """Classifier-free guidance weight of the labelled flow."""
    widths: tuple[int, ...] = (32, 64)
    """Channels of the UNet by resolution."""
    base_iterations: int = 3000
    """Updates of each base flow."""
    classifier_iterations: int = 600
    """Updates of the classifier."""
    stops: tuple[int, ...] = (4, 8, 16, 32)
    """Updates of reward backpropagation, each a point of its frontier."""
    backprop_batch: int = 96
    """Samples an update of it."""
    backprop_lr: float = 1e-3
    """Learning rate of reward backpropagation."""
    candidates: tuple[int, ...] = (2, 4, 8, 16, 32)
    """n of best-of-n."""
    base_samples: int = 32_768
    """Samples of each law of each base, for best-of-n and importance-resampling."""
    samples: int = 4096
    """Samples of every other law."""
    batch: int = 512
    """Samples that are judged together."""
    ode_steps: int = 25
    """Adams-Bashforth steps of every ODE sample."""
    seed: int = 0
    """Seed of everything random."""
    threads: int = 1
    """Threads of PyTorch."""
    folder: Path = Path("outputs/benchmark-digits-frontier")
    """What has been computed."""
    results: Path = Path(__file__).parent / "results" / "digits_frontier.json"
    """The record; the figures stand beside it."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.problems if name not in PROBLEMS]
        if unknown:
            raise ValueError(f"problems must be of {', '.join(PROBLEMS)}, got {unknown}")
        if self.samples < 2 * self.batch:
            raise ValueError(
                f"samples must be at least two batches of {self.batch}, got {self.samples}"
            )
        if self.base_samples < 2 * self.batch * max(self.candidates):
            raise ValueError(
                f"base_samples must give two batches of {self.batch} for the best of "
                f"{max(self.candidates)}, got {self.base_samples}"
            )

    def identity(self, *names: str) -> dict[str, Any]:
        """The options ``names`` and those that everything depends on, as plain data."""
        found = {name: getattr(self, name) for name in (*SHARED, *names)}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in found.items()}

    def seed_of(self, name: str) -> int:
        """A seed for what is called ``name``."""
        return (zlib.crc32(name.encode()) + self.seed) % 2**31


def watchers(config: FrontierConfig, name: str) -> list[Callback]:
    """Progress bar and log of one training."""
    return [ProgressBar(name), CSVLogger(config.folder / f"{name}.csv")]


@dataclass(frozen=True, eq=False)
class Study:
    """What all methods share: data, classifier, and the two bases, trained or resumed."""

    config: FrontierConfig
    data: Digits
    classifier: Classifier
    judge: Judge
    bases: dict[bool, nn.Module] = field(default_factory=dict)

    @classmethod
    def begin(cls, config: FrontierConfig) -> Study:
        """Load the data and train or resume the classifier."""
        data = handwriting.load(config.seed)
        classifier = handwriting.fit_classifier(
            data,
            iterations=config.classifier_iterations,
            seed=config.seed,
            callbacks=watchers(config, "classifier"),
            checkpoint=config.folder / "classifier.pt",
            resume=True,
        )
        return cls(config, data, classifier, Judge(classifier, data, config.batch))

    def base(self, *, labelled: bool) -> nn.Module:
        """The plain flow, or the guided one."""
        config = self.config
        if labelled not in self.bases:
            name = "base-labelled" if labelled else "base"
            flow = fit_unet(
                self.data,
                widths=config.widths,
                labelled=labelled,
                iterations=config.base_iterations,
                seed=config.seed,
                callbacks=watchers(config, name),
                checkpoint=config.folder / f"{name}.pt",
                resume=True,
            )
            self.bases[labelled] = guided(flow, config.guidance) if labelled else flow
        return self.bases[labelled]

    def kept(
        self, name: str, identity: Mapping[str, Any], compute: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """What ``compute`` returns, from the folder where it is there.

        Raises:
            CheckpointError: it was computed with other options.
        """
        path = self.config.folder / f"{name}.pt"
        if path.exists():
            return checkpoints.load(path, expect=dict(identity))
        found = {**compute(), "problem": dict(identity)}
        checkpoints.save(path, found)
        return found


class Runs:
    """All methods on one problem; each returns its points in the order of its strengths."""

    def __init__(self, study: Study, name: str) -> None:
        self.study, self.config, self.name = study, study.config, name
        self.problem = PROBLEMS[name]
        self.reward: Reward = make_rewards(study.classifier, study.config.digit)[
            self.problem.reward
        ]
        self.labelled = self.problem.labelled
        self.model = "guided" if self.labelled else "plain"

    @cached_property
    def base(self) -> nn.Module:
        """The flow that is tilted."""
        return self.study.base(labelled=self.labelled)

    @cached_property
    def pool(self) -> Drawn:
        """Samples of the base's ODE."""
        config, name = self.config, f"pool-{self.model}-ode"

        def compute() -> dict[str, Any]:
            drawn = self.ode(self.base, config.base_samples, config.seed_of(name))
            return {"samples": drawn.samples, "labels": drawn.labels}

        kept = self.study.kept(name, config.identity("base_samples"), compute)
        return Drawn(kept["samples"], kept["labels"])

    def chain_pool(self, tilted: Tilted) -> Drawn:
        """Samples of the base's chain; it is the same for all tilts of a base."""
        config, name = self.config, f"pool-{self.model}-chain"

        def compute() -> dict[str, Any]:
            drawn, _ = by_chain(
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
        kept = self.study.kept(name, identity, compute)
        return Drawn(kept["samples"], kept["labels"])

    def ode(self, velocity: Any, n: int, seed: int) -> Drawn:
        """Samples by the ODE of a velocity field."""
        steps = self.config.ode_steps
        return by_ode(velocity, n, labelled=self.labelled, steps=steps, seed=seed)

    def point(
        self,
        method: str,
        strength: float,
        draw: Callable[[], tuple[Tensor, Row]],
        *options: str,
    ) -> Point:
        """The point of ``method`` at ``strength``, from the folder or computed.

        Arguments:
            draw: gives the samples and what the row holds besides.
            options: those of the configuration that the point depends on besides the shared ones.
        """

        def compute() -> dict[str, Any]:
            started = time.process_time()
            x, more = draw()
            with torch.no_grad():
                metrics = self.study.judge(x, self.reward(x))
            seconds = {"cpu_seconds": time.process_time() - started}
            return {"row": more | seconds, "metrics": metrics, "images": x[:IMAGES].clone()}

        name = f"points/{self.name.replace(' ', '-')}-{method}-{strength:g}"
        kept = self.study.kept(name, self.config.identity(*options), compute)
        return Point(self.name, method, strength, kept["metrics"], kept["images"], kept["row"])

    def unchanged(self) -> Point:
        """The base."""
        n = self.config.samples
        return self.point("base", 0, lambda: (self.pool.samples[:n], {}), "base_samples")

    def enough_for(self, n: int) -> bool:
        """Whether the best of ``n``, under each label, fill two batches."""
        found = sum(len(part.samples) // n for part in self.pool.by_label())
        return found >= 2 * self.config.batch

    def best(self, n: int) -> Point:
        """The best of ``n`` samples of the base, under one label where there are labels."""

        def draw() -> tuple[Tensor, Row]:
            chosen = []
            for part in self.pool.by_label():
                with torch.no_grad():
                    index = best_of(self.reward(part.samples), n)
                chosen.append(part.samples[index])
            x = torch.cat(chosen)
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(n))
            return x[order][: self.config.samples], {}

        return self.point("best_of_n", n, draw, "base_samples")

    def exact(self, temperature: float) -> Point:
        """The exact tilt: samples of the base's ODE, drawn with their weights."""

        def draw() -> tuple[Tensor, Row]:
            parts = self.pool.by_label()
            generator = torch.Generator().manual_seed(self.config.seed_of("exact"))
            drawn = []
            for part in parts:
                exact = resample_tilt(part.samples, self.reward.scaled(1 / temperature))
                drawn.append(exact.sample(-(-self.config.samples // len(parts)), generator))
            x = torch.cat(drawn)
            return x[torch.randperm(len(x), generator=generator)][: self.config.samples], {}

        return self.point("exact", temperature, draw, "base_samples")

    def guidance(self, strength: float) -> Point:
        """Gradient guidance at sampling time."""
        seed = self.config.seed_of(f"{self.name} guidance {strength}")

        def draw() -> tuple[Tensor, Row]:
            velocity = RewardGuidance(self.base, self.reward, strength)
            return self.ode(velocity, self.config.samples, seed).samples, {}

        return self.point("guidance", strength, draw)

    def backpropagation(self, *, last_only: bool) -> list[Point]:
        """Reward backpropagation, a point for each number of updates."""
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

        def draw(stop: int) -> tuple[Tensor, Row]:
            if not models:
                train()
            seed = config.seed_of(f"{self.name} {method} {stop}")
            return self.ode(models[stop], config.samples, seed).samples, {}

        options = ("steps", "backprop_batch", "backprop_lr", "stops")
        return [self.point(method, stop, partial(draw, stop), *options) for stop in config.stops]

    def tilted(self, temperature: float, *, low_rank: bool) -> Point:
        """A tilt, in full or by adapters, with its certificate and class frequencies."""
        config = self.config
        method = "tilt_lora" if low_rank else "tilt"
        name = f"{self.name.replace(' ', '-')}-{method}-{temperature:g}"

        def draw() -> tuple[Tensor, Row]:
            result = self._tilt(temperature, name, low_rank=low_rank)
            drawn = self.ode(result.field, config.samples, config.seed_of(name))
            return drawn.samples, self._judged(result, temperature, drawn)

        shared = ("base_samples", "kernel", "steps", "iterations", "batch_size", "min_ess")
        own = ("lora_rank", "lora_lr") if low_rank else ("lr",)
        return self.point(method, temperature, draw, *shared, *own)

    def _tilt(self, temperature: float, name: str, *, low_rank: bool) -> Tilted:
        """The trained tilt; resumed where it stopped."""
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
            ema_decay=0.99,
            seed=config.seed,
            probe_samples=min(2048, config.base_samples),
            certificate_samples=0,  # `_judged` makes them, with the labels
            checkpoint_every=100,
        )
        return tilt(
            base,
            self.reward,
            shape=(DIM,),
            config=options,
            model=model,
            cond_sampler=draw_labels if self.labelled else None,
            callbacks=watchers(config, name),
            checkpoint=config.folder / f"{name}.pt",
            resume=True,
            problem={"reward": self.problem.reward, "digit": config.digit},
        )

    def _judged(self, result: Tilted, temperature: float, ode: Drawn) -> Row:
        """Certificate and class frequencies of a tilt; ``ode`` are its ODE samples."""
        config, scaled = self.config, self.reward.scaled(1 / temperature)
        (chain, after), (_, before) = (
            by_chain(
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
        untilted = Drawn(before.samples, chain.labels, before.log_weights)
        summary = certificate_summary(untilted)
        row |= {f"{name}_base": summary[name] for name in ("log_weight_std", "ess")}
        laws = {"ode": ode, "chain": chain, "weighted": chain}
        for law, drawn in laws.items():
            comparison = compare_laws(
                self.study.classifier,
                self.pool if law == "ode" else base_chain,
                drawn,
                self.reward,
                temperature,
                weighted=law == "weighted",
            )
            z = comparison.z.abs()
            row |= {
                f"within_{law}": int((z <= 2).sum()),
                f"max_z_{law}": float(z.max()),
                f"class_tv_{law}": comparison.total_variation,
            }
            own = "log_z_ode" if law == "ode" else "log_z_exact"
            row |= {
                own: comparison.resampled.log_z,
                f"{own}_stderr": comparison.resampled.log_z_stderr,
            }
        return row

    def points(self) -> list[Point]:
        """Every point of the problem."""
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


def main(config: FrontierConfig) -> None:
    """Compute what is missing, print a table, write the record and the figures."""
    torch.set_num_threads(config.threads)
    prepare_process()
    study = Study.begin(config)
    points: dict[str, list[Point]] = {}
    rows: list[Row] = []
    for name in config.problems:
        points[name] = Runs(study, name).points()
        new = frontier_rows.make_rows(points[name])
        for row in new:
            row |= {"nearest_held_out": study.judge.held_out}
            print(frontier_rows.line(row), flush=True)
        rows += new
        config.results.parent.mkdir(parents=True, exist_ok=True)
        write_json(config.results, rows)
        frontier_figure.frontiers(config.results.with_suffix(".png"), points)
        stem = config.results.with_name(f"{config.results.stem}_images.png")
        frontier_figure.examples(stem, points)


if __name__ == "__main__":
    main(tyro.cli(FrontierConfig, prog="python -m benchmarks.digits_frontier"))
