"""As joint_nm24, with each layer tuned, its masks too (SR-STE, 2102.04010), and the calibration of tuned_int4_offset.

hsai compress runs/quickstart --recipe configs/compress/learned_nm24.py --out runs/quickstart/learned_nm24
"""

from dataclasses import replace

from configs.compress import joint_nm24, learned_nm24_int4_offset
from hsai.compress.recipe import RecipeConfig


def get_config() -> RecipeConfig:
    """The parent's formats, with the reconstruction and the windows of the other."""
    other = learned_nm24_int4_offset.get_config()
    return replace(joint_nm24.get_config(), reconstruction=other.reconstruction, calibration=other.calibration)
