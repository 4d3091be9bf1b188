"""As int4, with the blocks solved over calibration (GPTQ): 4.25 bits a weight.

hsai compress runs/quickstart --recipe configs/compress/gptq_int4.py --out runs/quickstart/gptq_int4
"""

from dataclasses import replace

from configs.compress import int4
from hsai.compress.calibration import CalibrationConfig
from hsai.compress.recipe import RecipeConfig
from hsai.compress.solvers import FeedbackConfig


def get_config() -> RecipeConfig:
    """The parent's format for the blocks by a solver; the embedding, which no block multiplies by, stays as it was."""
    parent = int4.get_config()
    (everything,) = parent.rules
    blocks = replace(everything, pattern="layers.*", solver=FeedbackConfig())
    return replace(parent, rules=(blocks, everything), calibration=CalibrationConfig())
