"""As nm24 (2:4 sparse, values in bfloat16), with masks and values solved together over calibration (SparseGPT).

hsai compress runs/quickstart --recipe configs/compress/joint_nm24.py --out runs/quickstart/joint_nm24
"""

from dataclasses import replace

from configs.compress import nm24
from hsai.compress.calibration import CalibrationConfig
from hsai.compress.recipe import RecipeConfig
from hsai.compress.solvers import FeedbackConfig


def get_config() -> RecipeConfig:
    """The parent with a solver for the blocks."""
    parent = nm24.get_config()
    blocks, *others = parent.rules
    return replace(parent, rules=(replace(blocks, solver=FeedbackConfig()), *others), calibration=CalibrationConfig())
