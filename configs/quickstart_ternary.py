"""The quickstart model with ternary blocks from its first step (BitNet b1.58, 2402.17764), and its embedding in int8.

    hsai train configs/quickstart_ternary.py
    hsai export runs/quickstart_ternary --out runs/quickstart_ternary/bundle

Each weight of a block is seen as -1, 0 or 1 times the mean magnitude of its group of 64: 2.25 bits. Activations stay as
they are, where the paper rounds them to 8 bits.
"""

from dataclasses import replace

from configs import quickstart
from hsai.config import RunConfig
from hsai.formats import Int8Config, TernaryConfig
from hsai.train.formats import FormatRule


def get_config() -> RunConfig:
    """The parent with one field changed."""
    parent = quickstart.get_config()
    blocks = FormatRule(pattern="layers.*", format=TernaryConfig(group=64))
    embedding = FormatRule(pattern="*", format=Int8Config())
    return replace(parent, train=replace(parent.train, formats=(blocks, embedding)))
