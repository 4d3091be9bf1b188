"""Recipes: which weight gets which format, by its name.

A recipe is an experiment like any other: a Python file with `get_config()`, that forks import and change by a line. A
rule that changes nothing (a name with a typing error, a rule behind one that takes all) is refused, so that a recipe
never promises more than the model got.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp

from hsai.compress.allocate import AllocationConfig, check_budget
from hsai.compress.budget import count_least
from hsai.compress.calibration import CalibrationConfig
from hsai.compress.grid import grid_of, pattern_of
from hsai.compress.half_quadratic import HalfQuadraticConfig
from hsai.compress.names import name_format
from hsai.compress.reconstruct import ReconstructionConfig
from hsai.compress.scaling import ScalingConfig
from hsai.compress.solvers import CalibratedConfig, FeedbackConfig, NearestConfig, SolverConfig, WandaConfig
from hsai.compress.transforms import TransformConfig, check_order, outline
from hsai.errors import InputError
from hsai.formats import NM, VNM, DenseConfig, FormatConfig, OutliersConfig, Packed, Unstructured, is_packed_as
from hsai.formats.kernels import Platform, explain_missing, list_present
from hsai.formats.storage import NAMES, named_weights
from hsai.models.layers import is_matrix


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """Gives one format to the weights whose names match."""

    pattern: str
    """Shell-style pattern on the dotted name: "layers.mlp.*", "layers.attention.[qkv]", "*embed", "*"."""

    format: FormatConfig | tuple[FormatConfig, ...]
    """What these weights become. Of several candidates an allocation chooses one for each layer of each weight."""

    solver: SolverConfig = NearestConfig()
    """How their values, scales and masks are found."""

    def __post_init__(self) -> None:
        if not self.pattern:
            raise InputError("rule pattern='' matches no weight; '*' matches all")
        if isinstance(self.format, tuple) and len(set(self.format)) != max(len(self.format), 2):
            raise InputError(
                f"rule {self.pattern!r}: candidates ({', '.join(map(name_format, self.format))}) leave nothing to "
                "choose; give two or more that differ, or one format by itself"
            )
        if isinstance(self.solver, HalfQuadraticConfig) and not any(map(grid_of, self.formats)):
            raise InputError(
                f"rule {self.pattern!r}: {', '.join(map(name_format, self.formats))} has no scales, and the "
                "half-quadratic solver finds nothing else; leave it nearest"
            )
        if isinstance(self.solver, WandaConfig) and not any(map(pattern_of, self.formats)):
            raise InputError(
                f"rule {self.pattern!r}: {', '.join(map(name_format, self.formats))} prunes nothing, and the Wanda "
                "solver chooses nothing else; leave it nearest"
            )
        if isinstance(self.solver, FeedbackConfig):
            if all(isinstance(format, DenseConfig) for format in self.formats):
                raise InputError(
                    f"rule {self.pattern!r}: a dense format has nothing to solve; leave its solver nearest"
                )
            if self.solver.mask != "joint" and not any(pattern_of(format) is not None for format in self.formats):
                raise InputError(
                    f"rule {self.pattern!r}: {', '.join(format.format for format in self.formats)} prunes nothing, so "
                    f"solver mask={self.solver.mask!r} has no effect; leave it 'joint'"
                )

    @property
    def formats(self) -> tuple[FormatConfig, ...]:
        """The candidates, or the one format."""
        return self.format if isinstance(self.format, tuple) else (self.format,)

    @property
    def is_open(self) -> bool:
        """Whether the format is yet to be chosen."""
        return isinstance(self.format, tuple)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """What to compress, and how."""

    rules: tuple[Rule, ...]
    """The first rule that matches a weight decides. Norm gains match none; what matches none stays as it is."""

    calibration: CalibrationConfig | None = None
    """The text that solvers over activations see, an allocation, and scaling; none where there is neither."""

    allocation: AllocationConfig | None = None
    """The budget by which candidates are chosen; none where each rule has one format."""

    reconstruction: ReconstructionConfig | None = None
    """How the layers are tuned once their weights are packed; none leaves them as the solver made them."""

    transforms: tuple[TransformConfig, ...] = ()
    """What is moved between weights before any is compressed: rotations, scales of channels."""

    def __post_init__(self) -> None:
        if not self.rules:
            raise InputError("rules=() compresses nothing; give at least one rule")
        solved = [rule.pattern for rule in self.rules if isinstance(rule.solver, CalibratedConfig)]
        if solved and self.calibration is None:
            raise InputError(f"rule {solved[0]!r} has a solver that reads activations, which needs a calibration")
        check_order(self.transforms)
        scaled = any(isinstance(transform, ScalingConfig) for transform in self.transforms)
        if scaled and self.calibration is None:
            raise InputError("transforms: scaling measures activations, which needs a calibration")
        if self.calibration is not None and not solved and not scaled and self.allocation is None:
            raise InputError("calibration is set, and no rule has a solver that reads it (FeedbackConfig, WandaConfig)")
        if self.reconstruction is not None:
            self._check_reconstruction()
        choices = [rule.pattern for rule in self.rules if rule.is_open]
        if choices and self.allocation is None:
            raise InputError(
                f"rule {choices[0]!r} leaves a choice of formats, which needs a budget (allocation=AllocationConfig())"
            )
        if self.allocation is not None:
            self._check_allocation(self.allocation, bool(choices))

    def _check_reconstruction(self) -> None:
        solved = [rule.pattern for rule in self.rules if isinstance(rule.solver, CalibratedConfig)]
        if self.calibration is None or not solved:
            raise InputError(
                "reconstruction is set, and no rule has a solver whose layers it could tune (FeedbackConfig, "
                "WandaConfig)"
            )
        batches = self.calibration.tokens // self.calibration.sequence_length // self.calibration.batch
        if batches < 2:
            raise InputError(
                "reconstruction tunes on some batches of the calibration and judges by others, and there is one; "
                f"lower calibration.batch={self.calibration.batch}, or raise calibration.tokens"
            )

    def _check_allocation(self, allocation: AllocationConfig, has_choice: bool) -> None:
        if not has_choice:
            raise InputError("allocation is set, and every rule has one format: there is nothing to choose")
        if self.calibration is None:
            raise InputError("an allocation measures sensitivities, which needs a calibration")
        available = self.calibration.tokens // self.calibration.sequence_length
        if allocation.windows > available or allocation.windows % self.calibration.batch:
            raise InputError(
                f"allocation.windows={allocation.windows} must be a multiple of calibration.batch="
                f"{self.calibration.batch}, and at most the {available} windows of the calibration"
            )


def match_weights(recipe: RecipeConfig, model: Any, target: Platform | None = None) -> dict[str, Rule]:
    """The rule of each weight that the recipe changes, in the order of the model, weights that its transforms add among
    them. A table that is only looked up, under a rule that solves over calibration what others are multiplied by, has
    nothing to be solved for: its rule has the nearest solver. Arrays are not touched.

    Raises `InputError` if a transform is not for this model, if a rule decides for no weight (naming the nearest names,
    or the rule that was first), if a format does not divide a weight, if a weight is quantized already, and not in the
    format of its rule, if layers are to be tuned with outliers, or with learned masks where nothing is sparse, or if
    candidates cannot meet the budget; and, of a `target`, if its kernels do not multiply by a format.
    """
    every = named_weights(outline(recipe.transforms, model))
    params = {name: param for name, param in every.items() if is_matrix(param)}
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
    head = "unembed" if "unembed" in params else "embed"
    multiplied = {name for name in rules if name.startswith("layers.") or name == head}  # others are looked up
    plain: dict[str, Rule] = {}
    tuned_rules: list[Rule] = []
    for name, rule in rules.items():
        for format in rule.formats:
            _check_fits(name, params[name].get_value(), format)
            if target is not None and name in multiplied:
                _check_runs(name, tuple(params[name].get_value().shape), format, target)
        solved = isinstance(rule.solver, CalibratedConfig)
        tuned = solved and recipe.reconstruction is not None and name.startswith("layers.")
        if tuned and rule not in tuned_rules:
            tuned_rules.append(rule)
        if tuned and any(isinstance(format, OutliersConfig) for format in rule.formats):
            raise InputError(
                f"{name}: reconstruction cannot tune outliers; give rule {rule.pattern!r} another format, or leave "
                "reconstruction=None"
            )
        if solved and name not in multiplied:
            if all(other not in multiplied for other, deciding in rules.items() if deciding is rule):
                raise InputError(
                    f"{name}: a solver over activations is for what is multiplied by, and this is looked up; "
                    "give it a rule of its own with the nearest solver, before this one"
                )
            plain[name] = dataclasses.replace(rule, solver=NearestConfig())
    if recipe.reconstruction is not None and recipe.reconstruction.masks == "learned":
        _check_masks(tuned_rules)
    if recipe.allocation is not None:
        shapes = {name: param.get_value() for name, param in every.items()}
        budget = recipe.allocation.count_bytes(sum(value.size for value in shapes.values()))
        check_budget(budget, count_least(shapes, {name: rule.formats for name, rule in rules.items()}))
    return rules | plain


def list_kept(rules: Mapping[str, Rule], model: Any) -> frozenset[str]:
    """Of the weights with a rule those that stay as they are: packed in its format, as training leaves them."""
    params = named_weights(model)
    return frozenset(
        name
        for name, rule in rules.items()
        if not rule.is_open and is_packed_as(params[name].get_value(), rule.formats[0])
    )


def reads_calibration(recipe: RecipeConfig, model: Any) -> bool:
    """Whether following the recipe takes calibration text: what solvers over activations would solve is not all kept,
    or formats are chosen, or channels scaled.

    Raises:
      InputError: see `match_weights`.
    """
    rules = match_weights(recipe, model)
    kept = list_kept(rules, outline(recipe.transforms, model))
    solves = any(isinstance(rule.solver, CalibratedConfig) and name not in kept for name, rule in rules.items())
    scales = any(isinstance(transform, ScalingConfig) for transform in recipe.transforms)
    return solves or scales or recipe.allocation is not None


def _check_masks(tuned: list[Rule]) -> None:
    """Raises `InputError` unless one of the rules whose weights are tuned with learned masks has any."""
    if not any(pattern_of(format) is not None for rule in tuned for format in rule.formats):
        found = "; ".join(f"{rule.pattern!r}: {', '.join(map(name_format, rule.formats))}" for rule in tuned)
        raise InputError(
            f"reconstruction.masks='learned', and what is tuned prunes nothing ({found or 'no rule of the layers'}); "
            "leave masks 'fixed'"
        )


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
    # The values of these are numbers as they were.
    if isinstance(value, Packed) and not isinstance(value, NM | VNM | Unstructured):
        raise InputError(f"{name} is {NAMES[type(value)]} already; compress the dense checkpoint instead")
    try:
        jax.eval_shape(format.pack, jax.ShapeDtypeStruct(value.shape, jnp.float32))
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def _check_runs(name: str, shape: tuple[int, ...], format: FormatConfig, target: Platform) -> None:
    """Raises `InputError`, naming the weight and what could be had, unless the target has a kernel for the format."""
    missing = explain_missing(format, shape, target)
    if missing is not None:
        present = ", ".join(map(name_format, list_present(shape, target)))
        raise InputError(
            f"{name}: no kernel for {target} multiplies by {name_format(format)}: {missing}; there are such for "
            f"{present or 'no packed format'}"
        )
