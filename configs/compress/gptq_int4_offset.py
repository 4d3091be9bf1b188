"""As int4_offset, solved over calibration (GPTQ), a table that is the head too: 5 bits a weight.

hsai compress runs/quickstart --recipe configs/compress/gptq_int4_offset.py --out runs/quickstart/gptq_int4_offset
"""

from dataclasses import replace

from configs.compress import int4_offset
from hsai.compress.calibration import CalibrationConfig
from hsai.compress.recipe import RecipeConfig
from hsai.compress.solvers import FeedbackConfig


def get_config() -> RecipeConfig:
    """The parent with a solver."""
    parent = int4_offset.get_config()
    rules = tuple(replace(rule, solver=FeedbackConfig()) for rule in parent.rules)
    return replace(parent, rules=rules, calibration=CalibrationConfig())
