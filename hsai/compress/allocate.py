"""One budget of bytes over all weights: which candidate each layer of each weight gets.

A candidate costs bytes, and a loss that was measured beforehand (`hsai.compress.sensitivity`). Losses of different
weights are taken to add up, so that one candidate an item with the least sum of losses under a sum of bytes is wanted:
a multiple-choice knapsack (HAWQ-V3, 2011.10680, section 3.4, gives it to a solver of integer programs). It is solved by
dynamic programming over the bytes (Dudzinski and Walukiewicz, "Exact methods for the knapsack problem and its
generalizations", 1987, section 5): the least loss of the first i items within every number of bytes. Sizes of weights
have large common divisors, in whose units the budget of most models is a small number; that makes it exact.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from rich.table import Table

from hsai.compress.names import name_format, name_ranges
from hsai.errors import InputError
from hsai.formats import FormatConfig

UNITS = 1 << 18
"""In which a budget is counted at most: a few hundred weights then take a second, and a byte for each and unit."""


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

    loss: float | None
    """The sensitivity: by how much the model's loss is expected to rise, in nats a token; None where that came out as
    no number."""

    @property
    def price(self) -> float:
        """`loss`, of which one that is no number is taken to be infinite."""
        return math.inf if self.loss is None else self.loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """One weight of one layer, or a table."""

    weight: str
    """Its name in the model."""

    layer: int | None
    """Its number, from 0; None for what has no layers."""

    options: tuple[Option, ...]
    """In the order of the rule's formats."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation:
    """How a budget was spent."""

    budget: int
    """Bytes that all parameters might hold."""

    least: int
    """What they would hold with the smallest candidates."""

    most: int
    """What they would hold with the candidates of least loss: a larger budget buys nothing."""

    items: tuple[Item, ...]
    """What was to be chosen, and among what."""

    chosen: tuple[int, ...]
    """Which option of each item."""

    @property
    def options(self) -> list[Option]:
        """What each item got."""
        return [item.options[index] for item, index in zip(self.items, self.chosen, strict=True)]

    @property
    def formats(self) -> dict[str, tuple[FormatConfig, ...]]:
        """Of each weight by its name: that of each layer, or the one of a table."""
        found: dict[str, tuple[FormatConfig, ...]] = {}
        for item, option in zip(self.items, self.options, strict=True):
            found[item.weight] = (*found.get(item.weight, ()), option.format)
        return found

    @property
    def loss(self) -> float | None:
        """The sum of what was measured for the choice, in nats a token: a forecast of the divergence; None where that
        of one is no number."""
        return _sum_losses(self.options)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the totals, and for each item its choice and all candidates."""

        def describe(option: Option) -> dict[str, Any]:
            return {"format": name_format(option.format), "bytes": option.bytes, "loss": option.loss}

        choices = [
            {
                "weight": item.weight,
                "layer": item.layer,
                **describe(option),
                "candidates": [describe(other) for other in item.options],
            }
            for item, option in zip(self.items, self.options, strict=True)
        ]
        totals = {"budget": self.budget, "least": self.least, "most": self.most, "loss": self.loss}
        return {**totals, "choices": choices}

    def table(self) -> Table:
        """For the console, of any width: a row a weight, with the layers of each of its formats."""
        table = Table()
        table.add_column("weight", no_wrap=True)
        table.add_column("formats: layers")
        table.add_column("nats a token", justify="right", no_wrap=True)
        rows: dict[str, list[tuple[int | None, Option]]] = {}
        for item, option in zip(self.items, self.options, strict=True):
            rows.setdefault(item.weight, []).append((item.layer, option))
        for weight, choices in rows.items():
            layers: dict[str, list[int]] = {}
            for layer, option in choices:
                layers.setdefault(name_format(option.format), []).extend([] if layer is None else [layer])
            formats = [f"{name}: {name_ranges(numbers)}" if numbers else name for name, numbers in layers.items()]
            loss = _sum_losses([option for _, option in choices])
            table.add_row(weight, "; ".join(formats), "no number" if loss is None else f"{loss:.2g}")
        return table


def _sum_losses(options: Sequence[Option]) -> float | None:
    """What they cost together; None where that of one is no number."""
    losses = [option.loss for option in options if option.loss is not None]
    return sum(losses) if len(losses) == len(options) else None


def check_budget(budget: int, least: int) -> None:
    """Raises `InputError` for a budget below the least bytes that a model can have with these candidates."""
    if budget < least:
        raise InputError(
            f"a budget of {budget:,} bytes cannot be met: with the smallest candidates of every weight the model has "
            f"{least:,} bytes; raise the budget, or give the recipe smaller candidates"
        )


def choose(items: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """The index of the option that each item gets: of all choices within the budget one with the fewest losses that
    are no numbers, of those one with the least sum of the others, and of those one with the fewest bytes.

    Where the budget is more than `UNITS` of the sizes' greatest common divisor, what an option takes beyond its item's
    smallest is rounded up to 1 / UNITS of it: the choice is then the best of a budget that is smaller by at most as
    many such parts as there are items, and what is left is spent on what saves most.

    Args:
      items: the options of each, at least one.
      budget: bytes that the chosen may hold together.
    Raises:
      InputError: the smallest options exceed it.
    """
    sizes = [np.array([option.bytes for option in item]) for item in items]
    known = [option.loss for item in items for option in item if option.loss is not None]
    worst = 1.0 + 2.0 * sum(known)  # more than all of the others together: where one must be taken, they still count
    losses = [np.array([min(option.price, worst) for option in item]) for item in items]
    least = sum(int(size.min()) for size in sizes)
    check_budget(budget, least)
    left = min(budget, sum(int(size.max()) for size in sizes)) - least
    divisor = math.gcd(*(int(more) for size in sizes for more in size - size.min())) or 1
    unit = max(divisor, -(-left // UNITS))
    extra = [-(-(size - size.min()) // unit) for size in sizes]
    chosen = _fill(extra, losses, left // unit)
    left -= sum(int(size[index] - size.min()) for size, index in zip(sizes, chosen, strict=True))
    while True:
        moves = [
            (loss[old] - loss[new], int(size[old] - size[new]), place, new)
            for place, (old, loss, size) in enumerate(zip(chosen, losses, sizes, strict=True))
            for new in range(len(loss))
            if loss[new] < loss[old] and size[new] - size[old] <= left
        ]
        if not moves:
            return chosen
        _, freed, place, new = max(moves)
        chosen[place], left = new, left + freed


def _fill(extra: Sequence[np.ndarray], losses: Sequence[np.ndarray], room: int) -> list[int]:
    """For each item the index into its `extra`, int (n,), and `losses`, float (n,): least losses within `room`."""
    best, taken = np.zeros(room + 1), []
    for units, loss in zip(extra, losses, strict=True):
        found, which = np.full(room + 1, np.inf), np.zeros(room + 1, np.uint8)
        for index in np.lexsort((units, loss))[::-1]:  # the last of equals stays: the smallest
            if units[index] <= room:
                with_it = best[: room + 1 - units[index]] + loss[index]
                better = with_it <= found[units[index] :]
                np.copyto(found[units[index] :], with_it, where=better)
                np.copyto(which[units[index] :], np.uint8(index), where=better)
        best = found
        taken.append(which)
    room = int(np.argmin(best))  # the first, of the fewest bytes
    chosen = []
    for units, which in zip(extra[::-1], taken[::-1], strict=True):
        chosen.append(int(which[room]))
        room -= int(units[chosen[-1]])
    return chosen[::-1]
