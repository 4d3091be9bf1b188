"""As gptq_int4, with a scale for each 128 weights, as GPTQ's authors measured it: 4.125 bits a weight.

hsai compress runs/quickstart --recipe configs/compress/gptq_int4_g128.py --out runs/quickstart/gptq_int4_g128
"""

from dataclasses import replace

from configs.compress import gptq_int4
from hsai.compress.recipe import RecipeConfig
from hsai.formats import Int4Config


def get_config() -> RecipeConfig:
    """The parent with wider groups in all weights."""
    parent = gptq_int4.get_config()
    return replace(parent, rules=tuple(replace(rule, format=Int4Config(group=128)) for rule in parent.rules))
