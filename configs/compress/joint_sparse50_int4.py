"""As sparse50_int4 (any 32 of 64 weights, in int4), with masks, scales and values solved over calibration.

hsai compress runs/quickstart --recipe configs/compress/joint_sparse50_int4.py --target none \\
    --out runs/quickstart/joint_sparse50_int4
"""

from dataclasses import replace

from configs.compress import sparse50_int4
from hsai.compress.calibration import CalibrationConfig
from hsai.compress.recipe import RecipeConfig
from hsai.compress.solvers import FeedbackConfig


def get_config() -> RecipeConfig:
    """The parent with a solver for the blocks."""
    parent = sparse50_int4.get_config()
    blocks, *others = parent.rules
    return replace(parent, rules=(replace(blocks, solver=FeedbackConfig()), *others), calibration=CalibrationConfig())
