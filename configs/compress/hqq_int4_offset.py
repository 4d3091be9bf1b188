"""As int4_offset, with scales and minima that suit most weights of a group and not its outliers (HQQ): 5 bits, no data.

hsai compress runs/quickstart --recipe configs/compress/hqq_int4_offset.py --out runs/quickstart/hqq_int4_offset
"""

from dataclasses import replace

from configs.compress import int4_offset
from hsai.compress.half_quadratic import HalfQuadraticConfig
from hsai.compress.recipe import RecipeConfig


def get_config() -> RecipeConfig:
    """The parent with another solver."""
    parent = int4_offset.get_config()
    return replace(parent, rules=tuple(replace(rule, solver=HalfQuadraticConfig()) for rule in parent.rules))
