"""64:2:8 sparse, three quarters of the weights gone, the rest in int8: 2.52 bits a weight in the blocks, 32 an output.

hsai compress runs/quickstart --recipe configs/compress/vnm28_int8.py --out runs/quickstart/vnm28_int8
"""

from dataclasses import replace

from configs.compress import nm24
from hsai.compress.recipe import RecipeConfig
from hsai.formats import VNMInt8Config


def get_config() -> RecipeConfig:
    """The parent with another format for the blocks."""
    parent = nm24.get_config()
    blocks, *others = parent.rules
    return replace(parent, rules=(replace(blocks, format=VNMInt8Config(v=64, n=2, m=8)), *others))
