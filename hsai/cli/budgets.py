"""--budget and --bits-per-weight: what recipes with a choice of formats may spend, one of them or several."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hsai.cli.parser import Parser
from hsai.cli.sizes import parse_size
from hsai.compress import RecipeConfig
from hsai.compress.allocate import Item
from hsai.compress.resume import Workbench
from hsai.configuration import to_dict
from hsai.errors import InputError

BUDGETS = ("bytes", "bits_per_weight")
"""Fields of an allocation that its prices do not depend on."""


def add_budget_arguments(parser: Parser) -> None:
    """Those of the command line."""
    parser.add_argument(
        "--budget", nargs="+", help="of recipes with a choice of formats: bytes of all parameters, such as 60MB"
    )
    parser.add_argument(
        "--bits-per-weight", nargs="+", type=float, help="the same as bits for each parameter, such as 2.5"
    )


def spread_budgets(recipes: Mapping[str, RecipeConfig], arguments: argparse.Namespace) -> dict[str, RecipeConfig]:
    """The recipes with the budget of the command line, if one was given; with several each recipe as often, the budget
    behind its name: "budget_2.5", "budget_60MB".

    Raises:
      InputError: one is no size, or no number of bits, or there twice; or both options are given; or a recipe leaves
        nothing to choose.
    """
    if arguments.budget is None and arguments.bits_per_weight is None:
        return dict(recipes)
    if arguments.budget is not None and arguments.bits_per_weight is not None:
        raise InputError("--budget and --bits-per-weight say the same thing; give one of them")
    option = "--bits-per-weight" if arguments.budget is None else "--budget"
    budgets: dict[str, tuple[int | None, float | None]] = (
        {f"{bits:g}": (None, bits) for bits in arguments.bits_per_weight}
        if arguments.budget is None
        else {size: (parse_size(size, option), None) for size in arguments.budget}
    )
    given = arguments.budget or arguments.bits_per_weight
    if len(budgets) < len(given):
        raise InputError(f"{option} {' '.join(map(str, given))}: one is there twice")
    changed = {}
    for name, recipe in recipes.items():
        if recipe.allocation is None:
            raise InputError(f"{option}: recipe {name} leaves no choice of formats, which a budget could decide")
        for text, (size, bits) in budgets.items():
            try:
                allocation = replace(recipe.allocation, bytes=size, bits_per_weight=bits)
            except InputError as error:
                raise InputError(f"{option} {text}: {error}") from error
            changed[name if len(budgets) == 1 else f"{name}_{text}"] = replace(recipe, allocation=allocation)
    return changed


class SharedTrials:
    """What candidates cost, measured once for all budgets that one command spends on the same recipe."""

    def __init__(self) -> None:
        self._known: dict[str, Mapping[int | None, Sequence[Item]]] = {}

    def lend(self, recipe: RecipeConfig, workbench: Workbench) -> bool:
        """Gives the run what an earlier one of this recipe measured; whether there was any."""
        known = self._known.get(_name_trials(recipe), {})
        workbench.adopt_trials(known)
        return bool(known)

    def keep(self, recipe: RecipeConfig, workbench: Workbench) -> None:
        """Takes over what the run measured, or found."""
        self._known[_name_trials(recipe)] = workbench.list_trials()


def _name_trials(recipe: RecipeConfig) -> str:
    """The same for recipes that differ in their budgets alone."""
    assert recipe.allocation is not None
    plain: dict[str, Any] = to_dict(recipe)
    plain["allocation"] = {name: value for name, value in plain["allocation"].items() if name not in BUDGETS}
    return json.dumps(plain, sort_keys=True)
