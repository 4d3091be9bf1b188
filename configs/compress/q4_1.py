"""What a GGUF file in Q4_1 holds, nearly as it is: the blocks unchanged, and the table, which is Q8_0 there, in int8.

hsai compress runs/quickstart --recipe configs/compress/q4_1.py --out runs/quickstart/q4_1
Expected of SmolLM2-135M-Instruct.Q4_1.gguf: 95.00 MB, 5.65 bits a weight, perplexity 1.001 of the dense model's.
"""

from dataclasses import replace

from configs.compress import int4_offset
from hsai.compress.recipe import RecipeConfig
from hsai.formats import Int8Config


def get_config() -> RecipeConfig:
    """The parent's blocks, and tables of 8 bits."""
    parent = int4_offset.get_config()
    (everything,) = parent.rules
    return replace(parent, rules=(replace(everything, pattern="layers.*"), replace(everything, format=Int8Config())))
