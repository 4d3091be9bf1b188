"""Half of the weights of the blocks in int4, any 32 of 64: 3.25 bits a weight, as nm24_int4 has. It saves no time.

hsai compress runs/quickstart --recipe configs/compress/sparse50_int4.py --target none \\
    --out runs/quickstart/sparse50_int4
"""

from dataclasses import replace

from configs.compress import nm24
from hsai.compress.recipe import RecipeConfig
from hsai.formats import UnstructuredInt4Config


def get_config() -> RecipeConfig:
    """The parent with another format for the blocks."""
    parent = nm24.get_config()
    blocks, *others = parent.rules
    format = UnstructuredInt4Config(density=0.5, block=64, group=64)
    return replace(parent, rules=(replace(blocks, format=format), *others))
