"""Rewards made of rewards: sums here, decoded ones in `adjoint.rewards.decoded`.

A composite reward is the sum of named terms.  Its terms are evaluated together with the gradient of
their sum, so that a training can log each term's mean at no cost.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

from torch import Tensor

from adjoint.rewards.reward import Reward, cap_norm
from flows.field import Cond


class Composite(Reward):
    """A reward that is the sum of its `terms`.

    A subclass defines `terms`, `terms_and_gradient` and `_times`.  Scale and smoothing belong to
    what it is made of; ``max_norm`` caps the gradient of the whole.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.max_norm = None

    def __call__(self, x: Tensor, cond: Cond | None = None) -> Tensor:
        """Sum of the terms, shape (B,)."""
        return total(self.terms(x, cond))

    def value_and_gradient(
        self, x: Tensor, cond: Cond | None = None, *, create_graph: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Sum of the terms (B,) and capped gradient; see `Reward.value_and_gradient`."""
        terms, gradient = self.terms_and_gradient(x, cond, create_graph=create_graph)
        return total(terms), gradient


class Sum(Composite):
    """The sum of rewards, each with its own scale, smoothing, cap and gradient.

    Arguments:
        parts: rewards; a sum among them that has no cap of its own is taken apart.
    """

    def __init__(self, *parts: Reward) -> None:
        super().__init__("sum")
        self.parts: tuple[Reward, ...] = ()
        for part in parts:
            inner = part.parts if isinstance(part, Sum) and part.max_norm is None else (part,)
            self.parts += inner

    def _times(self, factor: float, cap_factor: float) -> Sum:
        clone = copy.copy(self)
        clone.parts = tuple(part._times(factor, cap_factor) for part in self.parts)
        if self.max_norm is not None:
            clone.max_norm = self.max_norm * cap_factor
        return clone

    def terms(self, x: Tensor, cond: Cond | None = None) -> dict[str, Tensor]:
        """Values (B,) of the terms; of those with one name, the second is called ``name_2``."""
        return joined(part.terms(x, cond) for part in self.parts)

    def terms_and_gradient(
        self, x: Tensor, cond: Cond | None = None, *, create_graph: bool = False
    ) -> tuple[dict[str, Tensor], Tensor]:
        """`terms` and the capped sum of the gradients, detached unless ``create_graph``."""
        found = [p.terms_and_gradient(x, cond, create_graph=create_graph) for p in self.parts]
        terms, gradients = zip(*found, strict=True)
        return joined(terms), cap_norm(sum(gradients), self.max_norm)


def total(terms: dict[str, Tensor]) -> Tensor:
    """The sum (B,) of terms."""
    first, *others = terms.values()
    return sum(others, first)


def joined(groups: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All terms under distinct names: a name met again gets _2, _3, ..."""
    result: dict[str, Tensor] = {}
    for group in groups:
        for name, value in group.items():
            copies, unique = 1, name
            while unique in result:
                copies += 1
                unique = f"{name}_{copies}"
            result[unique] = value
    return result
