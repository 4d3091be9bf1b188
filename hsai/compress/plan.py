"""What a recipe makes of a model, weight by weight, before any of it is computed.

A rule that changes nothing (a name with a typing error, a rule behind one that takes all) is refused, so that a recipe
never promises more than the model got. Arrays are not touched: a model of shapes has a plan too.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp

from hsai.compress.allocate import check_budget
from hsai.compress.budget import count_least
from hsai.compress.grid import pattern_of
from hsai.compress.names import name_format
from hsai.compress.plain import NearestConfig
from hsai.compress.recipe import ROUTER, RecipeConfig, Rule
from hsai.compress.scaling import ScalingConfig
from hsai.compress.solvers import CalibratedConfig
from hsai.compress.transforms import outline
from hsai.errors import InputError
from hsai.formats import NM, VNM, FormatConfig, OutliersConfig, Packed, Unstructured, is_packed_as
from hsai.formats.kernels import Platform, explain_missing, list_present
from hsai.formats.storage import NAMES, named_weights
from hsai.models.layers import is_matrix


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Which rule decides for which weight of a model, and what following them takes."""

    rules: Mapping[str, Rule]
    """Of each weight that the recipe changes, in the order of the model, those that its transforms add among them. A
    table that is only looked up has nothing to be solved for: under a rule that solves over calibration what others are
    multiplied by, its own has the nearest solver."""

    kept: frozenset[str]
    """Of these the weights that stay as they are: packed in the format of their rule, as training leaves them."""

    multiplied: Mapping[str, tuple[int, ...]]
    """Shapes of those that are multiplied by, and not only looked up."""

    reads_text: bool
    """Whether following the recipe takes calibration text: what solvers over activations would solve is not all kept,
    or formats are chosen, or channels scaled."""

    @property
    def measured(self) -> tuple[str, ...]:
        """The weights whose output errors text can tell where the plan reads none: multiplied by, and changed."""
        return tuple(name for name in self.multiplied if name not in self.kept)


def plan_recipe(recipe: RecipeConfig, model: Any) -> Plan:
    """The plan of a recipe for a model, whose arrays may be shapes.

    Raises:
      InputError: a transform is not for this model; a rule decides for no weight (naming the nearest names, or the rule
        that was first); a format does not divide a weight; a weight is quantized already, and not in the format of its
        rule; a rule solves over calibration what is only looked up; layers are to be tuned with outliers, or with
        learned masks where nothing is sparse; or candidates cannot meet the budget.
    """
    every = named_weights(outline(recipe.transforms, model))
    params = {name: param.get_value() for name, param in every.items() if is_matrix(param)}
    rules = _find_rules(recipe.rules, list(params))
    for name, rule in rules.items():
        for format in rule.formats:
            _check_fits(name, params[name], format)
    head = "unembed" if "unembed" in params else "embed"
    multiplied = {name: tuple(params[name].shape) for name in rules if is_stacked(name) or name == head}
    for name, rule in rules.items():
        if name in multiplied or not isinstance(rule.solver, CalibratedConfig):
            continue
        if not any(rules[other] is rule for other in multiplied):
            raise InputError(
                f"{name}: a solver over activations is for what is multiplied by, and this is looked up; "
                "give it a rule of its own with the nearest solver, before this one"
            )
    if recipe.reconstruction is not None:
        _check_tuned(
            {
                name: rule
                for name, rule in rules.items()
                if is_stacked(name) and isinstance(rule.solver, CalibratedConfig)
            },
            learned=recipe.reconstruction.masks == "learned",
        )
    if recipe.allocation is not None:
        values = {name: param.get_value() for name, param in every.items()}
        budget = recipe.allocation.count_bytes(sum(value.size for value in values.values()))
        check_budget(budget, count_least(values, {name: rule.formats for name, rule in rules.items()}))
    kept = frozenset(
        name for name, rule in rules.items() if not rule.is_open and is_packed_as(params[name], rule.formats[0])
    )
    planned = {name: rule if name in multiplied else _leave_plain(rule) for name, rule in rules.items()}
    solves = any(isinstance(rule.solver, CalibratedConfig) for name, rule in planned.items() if name not in kept)
    scales = any(isinstance(transform, ScalingConfig) for transform in recipe.transforms)
    return Plan(
        rules=planned,
        kept=kept,
        multiplied=multiplied,
        reads_text=solves or scales or recipe.allocation is not None,
    )


def check_kernels(plan: Plan, target: Platform) -> None:
    """Raises `InputError` for the first weight that would be multiplied by in a format for which the target has no
    kernel, with what could be had. A table that is only looked up needs none."""
    for name, shape in plan.multiplied.items():
        for format in plan.rules[name].formats:
            missing = explain_missing(format, shape, target)
            if missing is not None:
                present = ", ".join(map(name_format, list_present(shape, target)))
                raise InputError(
                    f"{name}: no kernel for {target} multiplies by {name_format(format)}: {missing}; there are such "
                    f"for {present or 'no packed format'}"
                )


def _find_rules(rules: tuple[Rule, ...], names: list[str]) -> dict[str, Rule]:
    """The first rule that matches each name; raises `InputError` for one that decides for none."""
    deciding: dict[str, int] = {}
    for name in names:
        number = next((number for number, rule in enumerate(rules) if rule.matches(name)), None)
        if number is not None:
            deciding[name] = number
    for number, rule in enumerate(rules):
        if number not in deciding.values():
            raise InputError(_explain_idle(rule, rules[:number], names))
    return {name: rules[number] for name, number in deciding.items()}


def _explain_idle(rule: Rule, earlier: tuple[Rule, ...], names: list[str]) -> str:
    """One line on why a rule decides for no weight."""
    matched = [name for name in names if rule.matches(name)]
    if matched:
        first = next(before.pattern for before in earlier if before.matches(matched[0]))
        return f"rule {rule.pattern!r} is never reached: an earlier rule, {first!r}, decides for {matched[0]!r}"
    routers = [name for name in names if ROUTER in name and fnmatchcase(name, rule.pattern)]
    if routers:
        return (
            f"rule {rule.pattern!r} matches no weight but {', '.join(routers)}, which stays as it is unless a pattern "
            f"has {ROUTER!r} in it"
        )
    near = difflib.get_close_matches(rule.pattern, names, n=3, cutoff=0.4) or names
    return f"rule {rule.pattern!r} matches no weight; the nearest are {', '.join(near)}"


def _check_fits(name: str, value: Any, format: FormatConfig) -> None:
    """Raises `InputError`, naming the weight, unless the format can hold it; nothing is computed."""
    if is_packed_as(value, format):
        return
    # The values of these are numbers as they were.
    if isinstance(value, Packed) and not isinstance(value, NM | VNM | Unstructured):
        raise InputError(f"{name} is {NAMES[type(value)]} already; compress the dense checkpoint instead")
    try:
        jax.eval_shape(format.pack, jax.ShapeDtypeStruct(value.shape, jnp.float32))
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def _check_tuned(tuned: Mapping[str, Rule], *, learned: bool) -> None:
    """Raises `InputError` for a weight that reconstruction cannot tune, and, where masks are learned, unless one of the
    weights has any."""
    for name, rule in tuned.items():
        if any(isinstance(format, OutliersConfig) for format in rule.formats):
            raise InputError(
                f"{name}: reconstruction cannot tune outliers; give rule {rule.pattern!r} another format, or leave "
                "reconstruction=None"
            )
    if learned and not any(pattern_of(format) is not None for rule in tuned.values() for format in rule.formats):
        rules = {rule.pattern: ", ".join(map(name_format, rule.formats)) for rule in tuned.values()}
        found = "; ".join(f"{pattern!r}: {formats}" for pattern, formats in rules.items())
        raise InputError(
            f"reconstruction.masks='learned', and what is tuned prunes nothing ({found or 'no rule of the layers'}); "
            "leave masks 'fixed'"
        )


def _leave_plain(rule: Rule) -> Rule:
    """The rule for a table that is only looked up."""
    return dataclasses.replace(rule, solver=NearestConfig()) if isinstance(rule.solver, CalibratedConfig) else rule


def is_stacked(name: str) -> bool:
    return name.startswith("layers.")
