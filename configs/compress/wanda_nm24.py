"""As joint_nm24, with the masks of Wanda (2306.11695): chosen beforehand by |w| times the norm of its input.

hsai compress runs/quickstart --recipe configs/compress/wanda_nm24.py --out runs/quickstart/wanda_nm24
"""

from dataclasses import replace

from configs.compress import joint_nm24
from hsai.compress.recipe import RecipeConfig
from hsai.compress.solvers import FeedbackConfig


def get_config() -> RecipeConfig:
    """The parent with other masks."""
    parent = joint_nm24.get_config()
    blocks, *others = parent.rules
    return replace(parent, rules=(replace(blocks, solver=FeedbackConfig(mask="wanda")), *others))
