"""As int3, solved over calibration (GPTQ): 3.25 bits a weight in the blocks.

hsai compress runs/quickstart --recipe configs/compress/gptq_int3.py --out runs/quickstart/gptq_int3
"""

from dataclasses import replace

from configs.compress import int3
from hsai.compress.calibration import CalibrationConfig
from hsai.compress.recipe import RecipeConfig
from hsai.compress.solvers import FeedbackConfig


def get_config() -> RecipeConfig:
    """The parent with a solver."""
    parent = int3.get_config()
    rules = tuple(replace(rule, solver=FeedbackConfig()) for rule in parent.rules)
    return replace(parent, rules=rules, calibration=CalibrationConfig())
