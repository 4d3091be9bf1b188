"""As sparse50 (half of the weights, any 32 of 64), with masks and values solved over calibration (SparseGPT).

hsai compress runs/quickstart --recipe configs/compress/joint_sparse50.py --target none \\
    --out runs/quickstart/joint_sparse50
"""

from dataclasses import replace

from configs.compress import sparse50
from hsai.compress.calibration import CalibrationConfig
from hsai.compress.recipe import RecipeConfig
from hsai.compress.solvers import FeedbackConfig


def get_config() -> RecipeConfig:
    """The parent with a solver for the blocks."""
    parent = sparse50.get_config()
    blocks, *others = parent.rules
    return replace(parent, rules=(replace(blocks, solver=FeedbackConfig()), *others), calibration=CalibrationConfig())
