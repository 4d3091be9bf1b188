"""As gptq_int4, with each layer tuned until it gives what the dense model's gave (BRECQ, 2102.05426).

hsai compress runs/quickstart --recipe configs/compress/tuned_int4.py --out runs/quickstart/tuned_int4
"""

from dataclasses import replace

from configs.compress import gptq_int4
from hsai.compress.recipe import RecipeConfig
from hsai.compress.reconstruct import ReconstructionConfig


def get_config() -> RecipeConfig:
    """The parent with a reconstruction."""
    return replace(gptq_int4.get_config(), reconstruction=ReconstructionConfig())
