"""2:8 sparse, three quarters of the weights gone, the rest in int4: 2 bits a weight in the blocks.

hsai compress runs/quickstart --recipe configs/compress/nm28_int4.py --out runs/quickstart/nm28_int4

Each output chooses among all 8 positions, where 64 outputs of vnm28_int4 have the same 4: what is kept has more of the
weights' norm, for a quarter of a bit more. Contractions must be multiples of 128.
"""

from dataclasses import replace

from configs.compress import nm24
from hsai.compress.recipe import RecipeConfig
from hsai.formats import NMInt4Config


def get_config() -> RecipeConfig:
    """The parent with another format for the blocks."""
    parent = nm24.get_config()
    blocks, *others = parent.rules
    return replace(parent, rules=(replace(blocks, format=NMInt4Config(n=2, m=8, group=64)), *others))
