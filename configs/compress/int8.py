"""Every matrix, the embedding included, in int8 with a scale an output: half of bfloat16, at hardly any loss.

hsai compress runs/quickstart --recipe configs/compress/int8.py --out runs/quickstart/int8
"""

from hsai.compress.recipe import RecipeConfig, Rule
from hsai.formats import Int8Config


def get_config() -> RecipeConfig:
    """8 bits a weight, and 32 an output."""
    return RecipeConfig(rules=(Rule(pattern="*", format=Int8Config()),))
