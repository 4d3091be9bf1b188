"""The matrices of the blocks ternary with a scale for each 64 weights, 2.25 bits a weight; the embedding is int8.

hsai compress runs/quickstart --recipe configs/compress/ternary.py --out runs/quickstart/ternary

A model that was not trained with ternary weights is of no use after rounding them in one shot: this is for measuring
speed, and to start recovery from.
"""

from dataclasses import replace

from configs.compress import nm24
from hsai.compress.recipe import RecipeConfig
from hsai.formats import TernaryConfig


def get_config() -> RecipeConfig:
    """The parent with another format for the blocks."""
    parent = nm24.get_config()
    blocks, *others = parent.rules
    return replace(parent, rules=(replace(blocks, format=TernaryConfig(group=64)), *others))
