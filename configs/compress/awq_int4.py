"""As int4, with channels scaled after their activations first (AWQ): the same bytes.

hsai compress runs/quickstart --recipe configs/compress/awq_int4.py --out runs/quickstart/awq_int4
"""

from dataclasses import replace

from configs.compress import int4
from hsai.compress.calibration import CalibrationConfig
from hsai.compress.recipe import RecipeConfig
from hsai.compress.scaling import ScalingConfig


def get_config() -> RecipeConfig:
    """The parent with scales; weights are rounded by themselves."""
    return replace(int4.get_config(), transforms=(ScalingConfig(),), calibration=CalibrationConfig())
