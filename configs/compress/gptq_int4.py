"""As int4, solved over calibration (GPTQ), a table that is the head too: 4.25 bits a weight.

hsai compress runs/quickstart --recipe configs/compress/gptq_int4.py --out runs/quickstart/gptq_int4
"""

from dataclasses import replace

from configs.compress import int4
from hsai.compress.calibration import CalibrationConfig
from hsai.compress.recipe import RecipeConfig
from hsai.compress.solvers import FeedbackConfig


def get_config() -> RecipeConfig:
    """The parent with a solver."""
    parent = int4.get_config()
    rules = tuple(replace(rule, solver=FeedbackConfig()) for rule in parent.rules)
    return replace(parent, rules=rules, calibration=CalibrationConfig())
