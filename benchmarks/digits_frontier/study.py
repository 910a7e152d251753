"""What all problems of the frontier of digits share: data, classifier, bases, and what is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from applications.common.callbacks import training_callbacks
from applications.toy2d.digits.classifier import Classifier, fit_classifier
from applications.toy2d.digits.data import Digits, load
from applications.toy2d.digits.unet_flow import fit_unet, guided
from benchmarks.digits_frontier.config import FrontierConfig
from benchmarks.digits_frontier.judge import Judge
from flows.training import checkpoint as checkpoints


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
        data = load(config.seed)
        classifier = fit_classifier(
            data,
            iterations=config.classifier_iterations,
            seed=config.seed,
            callbacks=training_callbacks("classifier", config.folder / "classifier.csv"),
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
                callbacks=training_callbacks(name, config.folder / f"{name}.csv"),
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
        found = {**compute(), "identity": dict(identity)}
        checkpoints.save(path, found)
        return found
