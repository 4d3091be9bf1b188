"""Half of the weights of the blocks in bfloat16, any 32 of 64: 9 bits a weight, as 2:4 has, and more of the norm stays.

hsai compress runs/quickstart --recipe configs/compress/sparse50.py --target none --out runs/quickstart/sparse50

It saves bytes, and no time: no kernel multiplies by it. The embedding stays int8, as in nm24.
"""

from dataclasses import replace

from configs.compress import nm24
from hsai.compress.recipe import RecipeConfig
from hsai.formats import UnstructuredConfig


def get_config() -> RecipeConfig:
    """The parent with another format for the blocks."""
    parent = nm24.get_config()
    blocks, *others = parent.rules
    return replace(parent, rules=(replace(blocks, format=UnstructuredConfig(density=0.5, block=64)), *others))
