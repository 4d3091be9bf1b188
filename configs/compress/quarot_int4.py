"""As gptq_int4, in other axes, in which no channel stands out (QuaRot, as far as it costs nothing when the model runs).

hsai compress runs/quickstart --recipe configs/compress/quarot_int4.py --out runs/quickstart/quarot_int4

A model whose head is its embedding table gets a second table for it, int4 as well.
"""

from dataclasses import replace

from configs.compress import gptq_int4
from hsai.compress.recipe import RecipeConfig
from hsai.compress.rotation import RotationConfig


def get_config() -> RecipeConfig:
    """The parent with a rotation."""
    return replace(gptq_int4.get_config(), transforms=(RotationConfig(untie=True),))
