"""One budget of bytes over all weights: which candidate each layer of each weight gets.

A candidate costs bytes, and a loss that was measured beforehand (`hsai.compress.sensitivity`). Losses of different
weights are taken to add up, so that one candidate an item with the least sum of losses under a sum of bytes is wanted:
a multiple-choice knapsack (HAWQ-V3, 2011.10680, section 3.4, gives it to a solver of integer programs). Its relaxation
has a plain solution: on the lower convex hull of each item's candidates every step to more bytes has a price, loss
saved a byte, and the best steps that the budget pays for are taken (Sinha and Zoltners, "The multiple-choice knapsack
problem", 1979). That is the optimum but for the one step that no longer fits; what it leaves over is then spent on
whatever saves most. So the sum of losses exceeds the optimum by less than that one step saves, of hundreds.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from hsai.errors import InputError
from hsai.formats import FormatConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllocationConfig:
    """A budget for the whole model, where rules leave a choice of formats; and how the choice is measured."""

    bytes: int | None = None
    """What all parameters together may hold: scales, indices and norm gains too."""

    bits_per_weight: float | None = None
    """The same as bits for each parameter of the model, in the place of `bytes`."""

    windows: int = 8
    """Windows of the calibration that sensitivities are measured over; a multiple of calibration.batch."""

    trial: Literal["solver", "nearest"] = "solver"
    """A candidate is tried as its rule would solve it, or rounded plainly: sooner done, and blind to how well each
    format can be made up for."""

    def __post_init__(self) -> None:
        if (self.bytes is None) == (self.bits_per_weight is None):
            raise InputError(
                f"allocation.bytes={self.bytes} and allocation.bits_per_weight={self.bits_per_weight}: "
                "give one of them as the budget"
            )
        if self.bytes is not None and self.bytes < 1:
            raise InputError(f"allocation.bytes={self.bytes} must be at least 1")
        if self.bits_per_weight is not None and not 0 < self.bits_per_weight <= 32:
            raise InputError(f"allocation.bits_per_weight={self.bits_per_weight:g} must be above 0 and at most 32")
        if self.windows < 1:
            raise InputError(f"allocation.windows={self.windows} must be at least 1")

    def count_bytes(self, parameters: int) -> int:
        """The budget of a model with so many parameters."""
        if self.bytes is not None:
            return self.bytes
        assert self.bits_per_weight is not None
        return int(self.bits_per_weight * parameters / 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """A candidate for one item."""

    format: FormatConfig
    """What the weight would become."""

    bytes: int
    """What its arrays would hold."""

    loss: float
    """The sensitivity: by how much the model's loss is expected to rise, in nats a token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """One weight of one layer, or a table."""

    weight: str
    """Its name in the model."""

    layer: int | None
    """Its number, from 0; None for what has no layers."""

    options: tuple[Option, ...]
    """In the order of the rule's formats."""


def check_budget(budget: int, least: int) -> None:
    """Raises `InputError` for a budget below the least bytes that a model can have with these candidates."""
    if budget < least:
        raise InputError(
            f"a budget of {budget:,} bytes cannot be met: with the smallest candidates of every weight the model has "
            f"{least:,} bytes; raise the budget, or give the recipe smaller candidates"
        )


def choose(items: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """The index of the option that each item gets.

    Args:
      items: the options of each, at least one.
      budget: bytes that the chosen may hold together.
    Raises:
      InputError: the smallest options exceed it.
    """
    hulls = [find_hull(options) for options in items]
    chosen = [hull[0] for hull in hulls]
    left = budget - sum(options[index].bytes for options, index in zip(items, chosen, strict=True))
    check_budget(budget, budget - left)
    steps = [
        (_price(items[item][old], items[item][new]), item, new)
        for item, hull in enumerate(hulls)
        for old, new in zip(hull, hull[1:], strict=False)
    ]
    stopped: set[int] = set()
    # Stable: a hull's own steps, whose prices fall, or are equal in floating point, stay in their order.
    for _, item, new in sorted(steps, key=lambda step: -step[0]):
        more = items[item][new].bytes - items[item][chosen[item]].bytes
        if item in stopped or more > left:
            stopped.add(item)
            continue
        chosen[item] = new
        left -= more
    while True:  # what no hull holds may still fit, and be better than what is there
        moves = [
            (items[item][old].loss - option.loss, item, new, option.bytes - items[item][old].bytes)
            for item, old in enumerate(chosen)
            for new, option in enumerate(items[item])
            if option.loss < items[item][old].loss and option.bytes - items[item][old].bytes <= left
        ]
        if not moves:
            return chosen
        _, item, new, more = max(moves, key=lambda move: (move[0], -move[3]))
        chosen[item] = new
        left -= more


def find_hull(options: Sequence[Option]) -> list[int]:
    """Indices of the options on the lower convex hull of loss over bytes: bytes rise, losses fall ever less steeply."""
    hull: list[int] = []
    for index in sorted(range(len(options)), key=lambda i: (options[i].bytes, options[i].loss)):
        if hull and options[index].loss >= options[hull[-1]].loss:
            continue
        while len(hull) > 1 and _price(options[hull[-2]], options[hull[-1]]) <= _price(
            options[hull[-1]], options[index]
        ):
            hull.pop()
        hull.append(index)
    return hull


def _price(old: Option, new: Option) -> float:
    """Loss saved for each byte more."""
    return (old.loss - new.loss) / (new.bytes - old.bytes)
