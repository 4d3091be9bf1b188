"""Every matrix, the embedding included, in int4 with a scale for each 64 weights.

hsai compress runs/quickstart --recipe configs/compress/int4.py --out runs/quickstart/int4
"""

from hsai.compress.recipe import RecipeConfig, Rule
from hsai.formats import Int4Config


def get_config() -> RecipeConfig:
    """4.25 bits a weight."""
    return RecipeConfig(rules=(Rule(pattern="*", format=Int4Config(group=64)),))
