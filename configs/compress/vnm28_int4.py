"""64:2:8 sparse, three quarters of the weights gone, the rest in int4: 1.77 bits a weight in the blocks.

hsai compress runs/quickstart --recipe configs/compress/vnm28_int4.py --out runs/quickstart/vnm28_int4

By magnitude, in one shot, this costs much more quality than 2:4: it is for measuring speed, and to start recovery from.
"""

from dataclasses import replace

from configs.compress import nm24
from hsai.compress.recipe import RecipeConfig
from hsai.formats import VNMInt4Config


def get_config() -> RecipeConfig:
    """The parent with another format for the blocks."""
    parent = nm24.get_config()
    blocks, *others = parent.rules
    return replace(parent, rules=(replace(blocks, format=VNMInt4Config(v=64, n=2, m=8, group=64)), *others))
