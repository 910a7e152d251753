"""Data, classifier, base flows and stored results that all problems of the frontier share."""

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
from benchmarks.digits_frontier.metrics import SampleMetrics
from flows.training import checkpoint as checkpoints


@dataclass(frozen=True, eq=False)
class Study:
    """The data, the classifier, the metrics and the two base flows, trained or resumed."""

    config: FrontierConfig
    data: Digits
    classifier: Classifier
    metrics: SampleMetrics
    bases: dict[bool, nn.Module] = field(default_factory=dict)

    @classmethod
    def begin(cls, config: FrontierConfig) -> Study:
        """Load the data, and train or resume the classifier."""
        data = load(config.seed)
        classifier = fit_classifier(
            data,
            iterations=config.classifier_iterations,
            seed=config.seed,
            callbacks=training_callbacks("classifier", config.folder / "classifier.csv"),
            checkpoint=config.folder / "classifier.pt",
            resume=True,
        )
        return cls(config, data, classifier, SampleMetrics(classifier, data, config.batch))

    def base(self, *, labelled: bool) -> nn.Module:
        """Return the flow without labels or the guided flow with labels, trained or resumed."""
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

    def cached(
        self, name: str, identity: Mapping[str, Any], compute: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Return the stored result called ``name``, or compute and store it.

        Raises:
            CheckpointError: the stored result was computed with other options.
        """
        path = self.config.folder / f"{name}.pt"
        if path.exists():
            return checkpoints.load(path, expect=dict(identity))
        found = {**compute(), "identity": dict(identity)}
        checkpoints.save(path, found)
        return found
