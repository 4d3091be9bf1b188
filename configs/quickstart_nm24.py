"""The quickstart model, trained 2:4 sparse from its first step; packing it to 2:4 then loses nothing.

hsai train configs/quickstart_nm24.py
"""

from dataclasses import replace

from configs import quickstart
from hsai.config import RunConfig
from hsai.formats import NMConfig
from hsai.train.formats import FormatRule


def get_config() -> RunConfig:
    """The parent with one field changed."""
    parent = quickstart.get_config()
    rule = FormatRule(pattern="layers.*", format=NMConfig(n=2, m=4))
    return replace(parent, train=replace(parent.train, formats=(rule,)))
