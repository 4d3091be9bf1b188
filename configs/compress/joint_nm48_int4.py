"""As nm48_int4 (4:8 sparse with int4 values), with masks, scales and values solved together over calibration.

hsai compress runs/quickstart --recipe configs/compress/joint_nm48_int4.py --out runs/quickstart/joint_nm48_int4
"""

from dataclasses import replace

from configs.compress import nm48_int4
from hsai.compress.calibration import CalibrationConfig
from hsai.compress.recipe import RecipeConfig
from hsai.compress.solvers import FeedbackConfig


def get_config() -> RecipeConfig:
    """The parent with a solver for the blocks."""
    parent = nm48_int4.get_config()
    blocks, *others = parent.rules
    return replace(parent, rules=(replace(blocks, solver=FeedbackConfig()), *others), calibration=CalibrationConfig())
