"""Recipes: which weight gets which format, by its name.

A recipe is an experiment like any other: a Python file with `get_config()`, that forks import and change by a line. A
rule that changes nothing (a name with a typing error, a rule behind one that takes all) is refused, so that a recipe
never promises more than the model got.
"""

import dataclasses
import difflib
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp

from hsai.compress.calibrated import FeedbackConfig, NearestConfig, SolverConfig
from hsai.compress.calibration import CalibrationConfig
from hsai.errors import InputError
from hsai.formats import NM, VNM, DenseConfig, FormatConfig, Packed, is_packed_as
from hsai.formats.storage import NAMES, named_weights
from hsai.models.layers import is_matrix


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """Gives one format to the weights whose names match."""

    pattern: str
    """Shell-style pattern on the dotted name: "layers.mlp.*", "layers.attention.[qkv]", "*embed", "*"."""

    format: FormatConfig
    """What these weights become."""

    solver: SolverConfig = NearestConfig()
    """How their values, scales and masks are found."""

    def __post_init__(self) -> None:
        if not self.pattern:
            raise InputError("rule pattern='' matches no weight; '*' matches all")
        if isinstance(self.solver, FeedbackConfig):
            if isinstance(self.format, DenseConfig):
                raise InputError(
                    f"rule {self.pattern!r}: a dense format has nothing to solve; leave its solver nearest"
                )
            if self.solver.mask != "joint" and not hasattr(self.format, "mask"):
                raise InputError(
                    f"rule {self.pattern!r}: {self.format.format} prunes nothing, so solver mask={self.solver.mask!r} "
                    "has no effect; leave it 'joint'"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """What to compress, and how."""

    rules: tuple[Rule, ...]
    """The first rule that matches a weight decides. Norm gains match none; what matches none stays as it is."""

    calibration: CalibrationConfig | None = None
    """The text that solvers with feedback see; none where no rule has one."""

    def __post_init__(self) -> None:
        if not self.rules:
            raise InputError("rules=() compresses nothing; give at least one rule")
        solved = [rule.pattern for rule in self.rules if isinstance(rule.solver, FeedbackConfig)]
        if solved and self.calibration is None:
            raise InputError(f"rule {solved[0]!r} has a solver with feedback, which needs a calibration")
        if self.calibration is not None and not solved:
            raise InputError("calibration is set, and no rule has a solver that reads it (solver=FeedbackConfig())")


def match_weights(recipe: RecipeConfig, model: Any) -> dict[str, Rule]:
    """The rule of each weight that the recipe changes, in the order of the model. Arrays are not touched.

    Raises `InputError` if a rule decides for no weight (naming the nearest names, or the rule that was first), if a
    format does not divide a weight, or if a weight is quantized already, and not in the format of its rule.
    """
    params = {name: param for name, param in named_weights(model).items() if is_matrix(param)}
    deciding: dict[str, int] = {}
    for name in params:
        for number, rule in enumerate(recipe.rules):
            if fnmatchcase(name, rule.pattern):
                deciding[name] = number
                break
    for number, rule in enumerate(recipe.rules):
        if number not in deciding.values():
            raise InputError(_explain_idle(rule, recipe.rules[:number], list(params)))
    rules = {name: recipe.rules[number] for name, number in deciding.items()}
    for name, rule in rules.items():
        _check_fits(name, params[name].get_value(), rule.format)
        if isinstance(rule.solver, FeedbackConfig) and not name.startswith("layers."):
            raise InputError(
                f"{name}: a solver with feedback calibrates the weights of layers only; give it a rule of its own "
                "with the nearest solver, before this one"
            )
    return rules


def _explain_idle(rule: Rule, earlier: tuple[Rule, ...], names: list[str]) -> str:
    """One line on why a rule decides for no weight."""
    matched = [name for name in names if fnmatchcase(name, rule.pattern)]
    if matched:
        first = next(before.pattern for before in earlier if fnmatchcase(matched[0], before.pattern))
        return f"rule {rule.pattern!r} is never reached: an earlier rule, {first!r}, decides for {matched[0]!r}"
    near = difflib.get_close_matches(rule.pattern, names, n=3, cutoff=0.4) or names
    return f"rule {rule.pattern!r} matches no weight; the nearest are {', '.join(near)}"


def _check_fits(name: str, value: Any, format: FormatConfig) -> None:
    """Raises `InputError`, naming the weight, unless the format can hold it; nothing is computed."""
    if is_packed_as(value, format):
        return
    if isinstance(value, Packed) and not isinstance(value, NM | VNM):  # whose values are numbers as they were
        raise InputError(f"{name} is {NAMES[type(value)]} already; compress the dense checkpoint instead")
    try:
        jax.eval_shape(format.pack, jax.ShapeDtypeStruct(value.shape, jnp.float32))
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
