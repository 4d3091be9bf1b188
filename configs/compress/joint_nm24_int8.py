"""As nm24_int8 (2:4 sparse with int8 values), with masks, scales and values solved together over calibration.

hsai compress runs/quickstart --recipe configs/compress/joint_nm24_int8.py --out runs/quickstart/joint_nm24_int8
"""

from dataclasses import replace

from configs.compress import nm24_int8
from hsai.compress.calibration import CalibrationConfig
from hsai.compress.recipe import RecipeConfig
from hsai.compress.solvers import FeedbackConfig


def get_config() -> RecipeConfig:
    """The parent with a solver for the blocks."""
    parent = nm24_int8.get_config()
    blocks, *others = parent.rules
    return replace(parent, rules=(replace(blocks, solver=FeedbackConfig()), *others), calibration=CalibrationConfig())
