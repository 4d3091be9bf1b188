"""2:4 sparse, with the kept weights in int4: 3.25 bits a weight in the blocks. The embedding stays int8, as in nm24.

hsai compress runs/quickstart --recipe configs/compress/nm24_int4.py --out runs/quickstart/nm24_int4
"""

from dataclasses import replace

from configs.compress import nm24
from hsai.compress.recipe import RecipeConfig
from hsai.formats import NMInt4Config


def get_config() -> RecipeConfig:
    """The parent with another format for the blocks."""
    parent = nm24.get_config()
    blocks, *others = parent.rules
    return replace(parent, rules=(replace(blocks, format=NMInt4Config(n=2, m=4, group=64)), *others))
