"""As joint_nm24_int4, with each layer tuned behind the masks that the solver chose.

hsai compress runs/quickstart --recipe configs/compress/tuned_nm24_int4.py --out runs/quickstart/tuned_nm24_int4
"""

from dataclasses import replace

from configs.compress import joint_nm24_int4
from hsai.compress.recipe import RecipeConfig
from hsai.compress.reconstruct import ReconstructionConfig


def get_config() -> RecipeConfig:
    """The parent with a reconstruction."""
    return replace(joint_nm24_int4.get_config(), reconstruction=ReconstructionConfig())
