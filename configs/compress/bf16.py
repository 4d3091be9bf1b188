"""Every matrix in bfloat16: the dense baseline that other recipes are compared with.

hsai compress runs/quickstart --recipe configs/compress/bf16.py --out runs/quickstart/bf16
"""

from hsai.compress.recipe import RecipeConfig, Rule
from hsai.formats import DenseConfig


def get_config() -> RecipeConfig:
    """16 bits a weight; norm gains stay float32, here and in every recipe."""
    return RecipeConfig(rules=(Rule(pattern="*", format=DenseConfig(dtype="bfloat16")),))
