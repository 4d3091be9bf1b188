"""The matrices of the blocks in int2 with a scale for each 64 weights, 2.25 bits a weight; the embedding is int4.

hsai compress runs/quickstart --recipe configs/compress/int2.py --out runs/quickstart/int2

Rounded in one shot, four levels cost a model much: this is what gptq_int2 is held against, and to start recovery from.
"""

from dataclasses import replace

from configs.compress import int4
from hsai.compress.recipe import RecipeConfig, Rule
from hsai.formats import Int2Config


def get_config() -> RecipeConfig:
    """The parent with a rule for the blocks in front."""
    parent = int4.get_config()
    return replace(parent, rules=(Rule(pattern="layers.*", format=Int2Config(group=64)), *parent.rules))
