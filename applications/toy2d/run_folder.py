"""The files of a run in the plane or of digits; `applications.common.run_folder` has the rules."""

from __future__ import annotations

from applications.common.run_folder import RunFiles
from applications.toy2d.config import RunConfig
from applications.toy2d.digits.config import DigitsConfig

FILES = RunFiles(
    checkpoints=("classifier.pt", "base.pt", "tilt.pt"),
    outputs=(
        *("classifier.csv", "base.csv", "tilt.csv", "report.json"),
        *("densities.png", "paths.png", "control.png", "certificate.png", "training.png"),
        *("flow.gif", "digits.png", "classes.png"),
    ),
    marker="base_iterations",
    last="report.json",
    renamed={**RunConfig.renamed, **DigitsConfig.renamed},
)
