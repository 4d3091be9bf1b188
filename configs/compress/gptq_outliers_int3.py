"""As outliers_int3, with the blocks solved over calibration, which also says what is kept apart (GPTQ, SpQR).

hsai compress runs/quickstart --recipe configs/compress/gptq_outliers_int3.py --out runs/quickstart/gptq_outliers_int3
"""

from dataclasses import replace

from configs.compress import outliers_int3
from hsai.compress.calibration import CalibrationConfig
from hsai.compress.recipe import RecipeConfig
from hsai.compress.solvers import FeedbackConfig


def get_config() -> RecipeConfig:
    """The parent with a solver for the blocks."""
    parent = outliers_int3.get_config()
    blocks, *others = parent.rules
    return replace(parent, rules=(replace(blocks, solver=FeedbackConfig()), *others), calibration=CalibrationConfig())
