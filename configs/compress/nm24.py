"""int8, with the matrices of the blocks 2:4 sparse in bfloat16 instead.

    hsai compress runs/quickstart --recipe configs/compress/nm24.py --out runs/quickstart/nm24

The embedding stays int8. A token reads one column of the table, so that pruning it would take half of the numbers that
stand for that token, with no sum over them to make up for it; and where the table is tied, the same numbers give the
logits of every position.
"""

from dataclasses import replace

from configs.compress import int8
from hsai.compress.recipe import RecipeConfig, Rule
from hsai.formats import NMConfig


def get_config() -> RecipeConfig:
    """The parent with a rule for the blocks in front: 9 bits a weight there."""
    parent = int8.get_config()
    return replace(parent, rules=(Rule(pattern="layers.*", format=NMConfig(n=2, m=4)), *parent.rules))
