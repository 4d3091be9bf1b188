"""As int2, solved over calibration (GPTQ): 2.25 bits a weight in the blocks.

hsai compress runs/quickstart --recipe configs/compress/gptq_int2.py --out runs/quickstart/gptq_int2
"""

from dataclasses import replace

from configs.compress import int2
from hsai.compress.calibration import CalibrationConfig
from hsai.compress.recipe import RecipeConfig
from hsai.compress.solvers import FeedbackConfig


def get_config() -> RecipeConfig:
    """The parent with a solver."""
    parent = int2.get_config()
    rules = tuple(replace(rule, solver=FeedbackConfig()) for rule in parent.rules)
    return replace(parent, rules=rules, calibration=CalibrationConfig())
