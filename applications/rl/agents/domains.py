"""The domains of the published values, and which of them a domain without values takes."""

from __future__ import annotations

from collections.abc import Sequence

DOMAINS = (
    "puzzle-3x3",
    "scene",
    "cube-double",
    "antmaze-large",
    "humanoidmaze-medium",
    "cube-triple",
    "cube-quadruple",
    "puzzle-4x4",
    "antmaze-giant",
    "humanoidmaze-large",
)
"""The domains that Li and Levine (arXiv 2601.14234) tuned, in the order of their tables."""

NEAREST = {
    "cube-single": "cube-double",
    "cube-octuple": "cube-quadruple",
    "puzzle-4x5": "puzzle-4x4",
    "puzzle-4x6": "puzzle-4x4",
    "pointmaze-medium": "antmaze-large",
    "pointmaze-large": "antmaze-large",
    "pointmaze-teleport": "antmaze-large",
    "pointmaze-giant": "antmaze-giant",
    "antmaze-medium": "antmaze-large",
    "antmaze-teleport": "antmaze-large",
    "antsoccer-arena": "antmaze-large",
    "antsoccer-medium": "antmaze-large",
    "humanoidmaze-teleport": "humanoidmaze-medium",
    "humanoidmaze-giant": "humanoidmaze-large",
}
"""The tuned domain whose values a domain takes that was not tuned."""


def by_domain(**rows: Sequence[float]) -> dict[str, dict[str, float]]:
    """Turn rows of a published table, an option each, into options by domain.

    Arguments:
        rows: of each option a value for each domain, in the order of `DOMAINS`.

    Raises:
        ValueError: a row has another length.
    """
    for name, row in rows.items():
        if len(row) != len(DOMAINS):
            raise ValueError(f"{name} must have {len(DOMAINS)} values, got {len(row)}")
    return {
        domain: {name: float(row[column]) for name, row in rows.items()}
        for column, domain in enumerate(DOMAINS)
    }
