"""As int4, with a minimum beside the scale of each 32 weights: the numbers of GGUF's Q4_1.

hsai compress runs/quickstart --recipe configs/compress/int4_offset.py --out runs/quickstart/int4_offset
What a GGUF file holds in Q4_1 is held without error: the same codes, scales and minima.
"""

from dataclasses import replace

from configs.compress import int4
from hsai.compress.recipe import RecipeConfig
from hsai.formats import Int4OffsetConfig


def get_config() -> RecipeConfig:
    """5 bits a weight."""
    parent = int4.get_config()
    (everything,) = parent.rules
    return replace(parent, rules=(replace(everything, format=Int4OffsetConfig(group=32)),))
