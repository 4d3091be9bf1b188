"""As budget, with each layer tuned in the formats that were chosen for it.

hsai compress runs/quickstart --recipe configs/compress/tuned_budget.py --out runs/quickstart/tuned_budget
"""

from dataclasses import replace

from configs.compress import budget
from hsai.compress.recipe import RecipeConfig
from hsai.compress.reconstruct import ReconstructionConfig


def get_config() -> RecipeConfig:
    """The parent with a reconstruction."""
    return replace(budget.get_config(), reconstruction=ReconstructionConfig())
