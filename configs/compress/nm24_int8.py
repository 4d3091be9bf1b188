"""2:4 sparse, with the kept weights in int8: 5 bits a weight in the blocks, and 32 an output; the embedding as in nm24.

hsai compress runs/quickstart --recipe configs/compress/nm24_int8.py --out runs/quickstart/nm24_int8
"""

from dataclasses import replace

from configs.compress import nm24
from hsai.compress.recipe import RecipeConfig
from hsai.formats import NMInt8Config


def get_config() -> RecipeConfig:
    """The parent with another format for the blocks."""
    parent = nm24.get_config()
    blocks, *others = parent.rules
    return replace(parent, rules=(replace(blocks, format=NMInt8Config(n=2, m=4)), *others))
