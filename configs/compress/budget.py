"""A format for each layer of each matrix, chosen under one budget of bytes by what the loss is sensitive to.

    hsai compress runs/quickstart --recipe configs/compress/budget.py --out runs/quickstart/budget
    hsai compress runs/quickstart --recipe configs/compress/budget.py --out runs/quickstart/small --budget 2MB

Every candidate of every layer is first solved and measured over a few windows of calibration text, which takes about as
long as that many recipes on as much text; then the chosen ones are solved over all of it. In the place of the recipe's
4 bits a weight, --budget or --bits-per-weight may say another budget.
"""

from hsai.compress.allocate import AllocationConfig
from hsai.compress.calibration import CalibrationConfig
from hsai.compress.recipe import RecipeConfig, Rule
from hsai.compress.solvers import FeedbackConfig
from hsai.formats import Int2Config, Int3Config, Int4Config, Int4OffsetConfig, Int8Config, NMInt4Config


def get_config() -> RecipeConfig:
    """From 2 to 8 bits a weight in the blocks; the embedding has 2 to 8, and is not pruned, as in nm24."""
    blocks = (
        Int8Config(),
        Int4OffsetConfig(group=32),
        Int4Config(group=32),
        Int4Config(group=64),
        NMInt4Config(n=4, m=8, group=64),
        Int3Config(group=64),
        NMInt4Config(n=2, m=4, group=64),
        Int2Config(group=64),
        NMInt4Config(n=2, m=8, group=64),
    )
    tables = (
        Int8Config(),
        Int4OffsetConfig(group=32),
        Int4Config(group=32),
        Int4Config(group=64),
        Int3Config(group=64),
        Int2Config(group=64),
    )
    return RecipeConfig(
        rules=(
            Rule(pattern="layers.*", format=blocks, solver=FeedbackConfig()),
            Rule(pattern="*", format=tables, solver=FeedbackConfig()),
        ),
        calibration=CalibrationConfig(),
        allocation=AllocationConfig(bits_per_weight=4.0),
    )
