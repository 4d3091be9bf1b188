"""4:8 sparse, with the kept weights in int4: 3.75 bits a weight in the blocks, half a bit more than nm24_int4.

hsai compress runs/quickstart --recipe configs/compress/nm48_int4.py --out runs/quickstart/nm48_int4

As many weights stay as in 2:4, and every choice that 2:4 has is one of its own: what is kept has more of their norm.
"""

from dataclasses import replace

from configs.compress import nm24
from hsai.compress.recipe import RecipeConfig
from hsai.formats import NMInt4Config


def get_config() -> RecipeConfig:
    """The parent with another format for the blocks."""
    parent = nm24.get_config()
    blocks, *others = parent.rules
    return replace(parent, rules=(replace(blocks, format=NMInt4Config(n=4, m=8, group=64)), *others))
