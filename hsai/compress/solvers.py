"""Solvers by their names: how the weights that a rule decides for are compressed.

What they stand for is in `hsai.compress.plain`, `half_quadratic`, `solver`, and `wanda`.
"""

import dataclasses
from typing import Literal

from hsai.compress.plain import PlainConfig
from hsai.compress.wanda import WandaConfig
from hsai.errors import InputError

MaskName = Literal["joint", "wanda", "magnitude"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeedbackConfig:
    """With error feedback over calibration's activations: GPTQ for a dense format, SparseGPT for a sparse one."""

    kind: Literal["feedback"] = "feedback"
    """Names this solver in files."""

    mask: MaskName = "joint"
    """Of a sparse format: chosen with the values, or beforehand by |w| ||x|| (as `WandaConfig`, which leaves the values
    alone) or by |w|."""

    damping: float = 0.01
    """Share of the mean of H's diagonal that is added to it; raised where that does not do."""

    order: Literal["natural", "activations"] = "natural"
    """In which positions are solved: as they stand, or those with the largest activations first (GPTQ's act-order), so
    that the others make up for them. The second takes scales that were searched beforehand."""

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise InputError(f"solver damping={self.damping} must be above 0 and at most 1")


CalibratedConfig = FeedbackConfig | WandaConfig
"""Solvers that look at what calibration's activations make of the weight."""

SolverConfig = PlainConfig | CalibratedConfig
