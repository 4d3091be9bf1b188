"""The matrices of the blocks in int3 with a scale for each 64 weights, 3.25 bits a weight; the embedding is int4.

hsai compress runs/quickstart --recipe configs/compress/int3.py --out runs/quickstart/int3

On a model of 135M parameters, a fifth of them in the embedding, that is 3.5 bits a weight altogether.
"""

from dataclasses import replace

from configs.compress import int4
from hsai.compress.recipe import RecipeConfig, Rule
from hsai.formats import Int3Config


def get_config() -> RecipeConfig:
    """The parent with a rule for the blocks in front."""
    parent = int4.get_config()
    return replace(parent, rules=(Rule(pattern="layers.*", format=Int3Config(group=64)), *parent.rules))
