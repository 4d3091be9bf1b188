"""Recipes: which weight gets which format, by its name.

A recipe is an experiment like any other: a Python file with `get_config()`, that forks import and change by a line.
What it makes of a model is a plan (`hsai.compress.plan`).
"""

import dataclasses
from fnmatch import fnmatchcase

from hsai.compress.allocate import AllocationConfig
from hsai.compress.calibration import CalibrationConfig
from hsai.compress.grid import grid_of, pattern_of
from hsai.compress.half_quadratic import HalfQuadraticConfig
from hsai.compress.names import name_format
from hsai.compress.plain import NearestConfig
from hsai.compress.reconstruct import ReconstructionConfig
from hsai.compress.scaling import ScalingConfig
from hsai.compress.solvers import CalibratedConfig, FeedbackConfig, SolverConfig, WandaConfig
from hsai.compress.transforms import TransformConfig, check_order
from hsai.errors import InputError
from hsai.formats import DenseConfig, FormatConfig

ROUTER = "router"
"""Part of the name of a weight that decides where tokens go, which a pattern has to name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """Gives one format to the weights whose names match."""

    pattern: str
    """Shell-style pattern on the dotted name: "layers.mlp.*", "layers.attention.[qkv]", "*embed", "*". The router of a
    mixture of experts matches a pattern with "router" in it alone: it is small, and what it rounds wrong sends tokens
    elsewhere."""

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

    def matches(self, name: str) -> bool:
        """Whether the pattern is of the weight called `name`."""
        return fnmatchcase(name, self.pattern) and (ROUTER in self.pattern or ROUTER not in name)

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
