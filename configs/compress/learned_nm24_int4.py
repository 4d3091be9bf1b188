"""As tuned_nm24_int4, with masks that go on from the solver's while layers are tuned (SR-STE, 2102.04010).

hsai compress runs/quickstart --recipe configs/compress/learned_nm24_int4.py --out runs/quickstart/learned_nm24_int4
"""

from dataclasses import replace

from configs.compress import tuned_nm24_int4
from hsai.compress.recipe import RecipeConfig


def get_config() -> RecipeConfig:
    """The parent with learned masks, and the pull that lets them settle."""
    parent = tuned_nm24_int4.get_config()
    return replace(parent, reconstruction=replace(parent.reconstruction, masks="learned", decay=0.01))
