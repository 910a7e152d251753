"""Seeds on the command line: numbers and ranges."""

from __future__ import annotations

from collections.abc import Sequence

from tyro.constructors import PrimitiveConstructorSpec


def parse_seeds(words: Sequence[str]) -> tuple[int, ...]:
    """Parse seeds from numbers and ranges: ``("0-3", "7")`` gives 0, 1, 2, 3, 7.

    Raises:
        ValueError: a word is neither number nor range, a range is empty, or a seed is there twice.
    """
    seeds: list[int] = []
    for word in words:
        first, dash, last = word.partition("-")
        if not (first.isdecimal() and (last.isdecimal() if dash else True)):
            raise ValueError(f"seeds must be numbers or ranges such as 0-11, got {word!r}")
        found = range(int(first), int(last if dash else first) + 1)
        if not found:
            raise ValueError(f"seeds: the range {word!r} is empty")
        seeds += found
    twice = [seed for seed in seeds if seeds.count(seed) > 1]
    if not seeds or twice:
        raise ValueError(f"seeds must be different numbers, got {' '.join(words) or 'none'}")
    return tuple(seeds)


SEEDS = PrimitiveConstructorSpec[tuple[int, ...]](
    nargs="*",
    metavar="[INT|INT-INT ...]",
    instance_from_str=parse_seeds,
    is_instance=lambda value: isinstance(value, tuple),
    str_from_instance=lambda seeds: [*map(str, seeds)],
)
"""Specification by which `tyro` reads seeds with `parse_seeds`."""
