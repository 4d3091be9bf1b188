"""The quickstart model, trained with every matrix in int4 from its first step (quantization-aware training, QAT).

    hsai train configs/quickstart_int4_qat.py
    hsai export runs/quickstart_int4_qat --out runs/quickstart_int4_qat/bundle

Scales are searched anew in every step, as packing would; the exported bundle is the model that was trained.
"""

from dataclasses import replace

from configs import quickstart
from hsai.config import RunConfig
from hsai.formats import Int4Config
from hsai.train.formats import FormatRule


def get_config() -> RunConfig:
    """The parent with one field changed."""
    parent = quickstart.get_config()
    rule = FormatRule(pattern="*", format=Int4Config(group=64))
    return replace(parent, train=replace(parent.train, formats=(rule,)))
