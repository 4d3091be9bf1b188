"""The quickstart model with blocks that are 2:4 sparse and int4 at once from the first step; its embedding is int8.

    hsai train configs/quickstart_nm24_int4.py
    hsai export runs/quickstart_nm24_int4 --out runs/quickstart_nm24_int4/bundle

3.25 bits a weight in the blocks, of which half is pruned by the magnitudes of each step.
"""

from dataclasses import replace

from configs import quickstart
from hsai.config import RunConfig
from hsai.formats import Int8Config, NMInt4Config
from hsai.train.formats import FormatRule


def get_config() -> RunConfig:
    """The parent with one field changed."""
    parent = quickstart.get_config()
    blocks = FormatRule(pattern="layers.*", format=NMInt4Config(n=2, m=4, group=64))
    embedding = FormatRule(pattern="*", format=Int8Config())
    return replace(parent, train=replace(parent.train, formats=(blocks, embedding)))
