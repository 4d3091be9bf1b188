"""As int3, with one in a hundred input channels of each matrix kept apart in bfloat16: about 3.4 bits a weight there.

hsai compress runs/quickstart --recipe configs/compress/outliers_int3.py --out runs/quickstart/outliers_int3
"""

from dataclasses import replace

from configs.compress import int3
from hsai.compress.recipe import RecipeConfig
from hsai.formats import Int3Config, OutliersConfig


def get_config() -> RecipeConfig:
    """The parent with another format for the blocks."""
    parent = int3.get_config()
    blocks, *others = parent.rules
    format = OutliersConfig(base=Int3Config(group=64), share=0.01)
    return replace(parent, rules=(replace(blocks, format=format), *others))
