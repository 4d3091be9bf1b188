"""As outliers_int3, solved over calibration, which also says what is kept apart (GPTQ, SpQR).

hsai compress runs/quickstart --recipe configs/compress/gptq_outliers_int3.py --out runs/quickstart/gptq_outliers_int3
"""

from dataclasses import replace

from configs.compress import outliers_int3
from hsai.compress.calibration import CalibrationConfig
from hsai.compress.recipe import RecipeConfig
from hsai.compress.solvers import FeedbackConfig


def get_config() -> RecipeConfig:
    """The parent with a solver."""
    parent = outliers_int3.get_config()
    rules = tuple(replace(rule, solver=FeedbackConfig()) for rule in parent.rules)
    return replace(parent, rules=rules, calibration=CalibrationConfig())
