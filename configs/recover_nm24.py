"""SmolLM2 135M, 2:4 sparse with values in bfloat16, trained beside the dense model: as recover_nm24_int4, from
learned_nm24.

    dense=$(hsai fetch smollm2-135m | tail -1)
    text=$(hsai fetch wikipedia | tail -1)
    hsai compress $dense --recipe configs/compress/learned_nm24.py --out runs/smollm2/nm24 --calibration $text/train.txt
    hsai train configs/recover_nm24.py --data.source $text --train.initialize-from runs/smollm2/nm24 \\
        --train.distill.teacher $dense
    hsai export runs/recover_nm24 --out runs/smollm2/recovered_nm24

Not measured yet.
"""

from dataclasses import replace
from pathlib import Path

from configs import recover_nm24_int4
from hsai.config import RunConfig
from hsai.formats import Int8Config, NMConfig
from hsai.train.formats import FormatRule


def get_config() -> RunConfig:
    """The parent in the formats of its recipe."""
    parent = recover_nm24_int4.get_config()
    formats = (
        FormatRule(pattern="layers.*", format=NMConfig(n=2, m=4), masks="fixed"),
        FormatRule(pattern="embed", format=Int8Config(), scales="learned"),
    )
    train = replace(parent.train, formats=formats, initialize_from=Path("runs/smollm2/nm24"))
    return replace(parent, train=train)
