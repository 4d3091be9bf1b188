"""As nm24, with the masks of Wanda (2306.11695): kept is where |w| times the norm of its input is largest, as it was.

hsai compress runs/quickstart --recipe configs/compress/wanda_nm24.py --out runs/quickstart/wanda_nm24
"""

from dataclasses import replace

from configs.compress import nm24
from hsai.compress.calibration import CalibrationConfig
from hsai.compress.recipe import RecipeConfig
from hsai.compress.wanda import WandaConfig


def get_config() -> RecipeConfig:
    """The parent with masks from calibration."""
    parent = nm24.get_config()
    blocks, *others = parent.rules
    return replace(parent, rules=(replace(blocks, solver=WandaConfig()), *others), calibration=CalibrationConfig())
