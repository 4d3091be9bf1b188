"""As learned_nm24_int4, with tables of 5 bits, and the calibration of tuned_int4_offset.

hsai compress runs/quickstart --recipe configs/compress/learned_nm24_int4_offset.py --out runs/quickstart/learned_nm24_int4_offset
Expected of SmolLM2-135M-Instruct: 60.97 MB, 3.626 bits a weight, perplexity 2.02 of the dense model's, in 35 minutes on
two CPU cores.
"""  # noqa: E501 (a command)

from dataclasses import replace

from configs.compress import learned_nm24_int4, tuned_int4_offset
from hsai.compress.recipe import RecipeConfig


def get_config() -> RecipeConfig:
    """The parent's blocks, with the tables and the windows of the other."""
    parent, other = learned_nm24_int4.get_config(), tuned_int4_offset.get_config()
    blocks, *_ = parent.rules
    *_, tables = other.rules
    return replace(parent, rules=(blocks, tables), calibration=other.calibration)
