"""As gptq_int4, solved in the order of falling activations (GPTQ's act-order): the same bytes, and smaller errors.

hsai compress runs/quickstart --recipe configs/compress/gptq_order_int4.py --out runs/quickstart/gptq_order_int4
"""

from dataclasses import replace

from configs.compress import gptq_int4
from hsai.compress.recipe import RecipeConfig
from hsai.compress.solvers import FeedbackConfig


def get_config() -> RecipeConfig:
    """The parent with another order."""
    parent = gptq_int4.get_config()
    blocks, *others = parent.rules
    return replace(parent, rules=(replace(blocks, solver=FeedbackConfig(order="activations")), *others))
