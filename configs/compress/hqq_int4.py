"""As int4, with scales that suit most weights of a group and not its outliers (HQQ): the same bytes, no data.

hsai compress runs/quickstart --recipe configs/compress/hqq_int4.py --out runs/quickstart/hqq_int4
"""

from dataclasses import replace

from configs.compress import int4
from hsai.compress.half_quadratic import HalfQuadraticConfig
from hsai.compress.recipe import RecipeConfig


def get_config() -> RecipeConfig:
    """The parent with another solver."""
    parent = int4.get_config()
    return replace(parent, rules=tuple(replace(rule, solver=HalfQuadraticConfig()) for rule in parent.rules))
