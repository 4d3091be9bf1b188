"""As joint_nm24, with the masks of wanda_nm24: chosen beforehand, and then the kept values make up for what is pruned.

hsai compress runs/quickstart --recipe configs/compress/wanda_updated_nm24.py --out runs/quickstart/wanda_updated_nm24

Between the two it says what of SparseGPT's gain is its masks, and what its updates. Wanda itself updates nothing.
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
