"""SmolLM2 135M, 2:4 sparse with int4 values, trained beside the dense model: recovery after compression.

    dense=$(hsai fetch smollm2-135m | tail -1)
    text=$(hsai fetch wikipedia | tail -1)
    hsai compress $dense --recipe configs/compress/learned_nm24_int4_offset.py --out runs/smollm2/nm24_int4 \\
        --calibration $text/train.txt
    hsai train configs/recover_nm24_int4.py --data.source $text --train.initialize-from runs/smollm2/nm24_int4 \\
        --train.distill.teacher $dense
    hsai export runs/recover_nm24_int4 --out runs/smollm2/recovered

Masks stay those that the compression learned; the values that they keep, the scales and the table are trained as their
codes see them, so that the run is the packed model already. Sized for two hours on two CPU cores, compression included.
The held-out tenth of the text is heldout.txt, which the compression did not see either.
Expected with --train.steps 160, which is 44 minutes behind the compression's 35: 60.97 MB, perplexity 1.72 of the dense
model's, where compression alone has 2.02.
"""

from dataclasses import replace
from pathlib import Path

from configs import models
from hsai.config import RunConfig
from hsai.data.corpus import DataConfig
from hsai.formats import Int4OffsetConfig, NMInt4Config
from hsai.train.checkpoint import CheckpointConfig
from hsai.train.distill import DistillConfig
from hsai.train.formats import FormatRule
from hsai.train.loop import TrainConfig
from hsai.train.optimizer import OptimizerConfig


def get_config() -> RunConfig:
    """The experiment; its formats are those of the recipe."""
    blocks, table = NMInt4Config(n=2, m=4, group=64), Int4OffsetConfig(group=32)
    return RunConfig(
        model=replace(models.smollm2_135m(), dtype="float32"),
        data=DataConfig(source="text", vocab_size=None, sequence_length=256, heldout_fraction=0.1),
        optim=OptimizerConfig(learning_rate=2e-4, warmup_steps=10, weight_decay=0.0),
        train=TrainConfig(
            steps=240,
            batch_size=4,
            initialize_from=Path("runs/smollm2/nm24_int4"),
            distill=DistillConfig(teacher=Path("runs/smollm2/dense"), share=0.5, hidden=0.1),
            formats=(
                FormatRule(pattern="layers.*", format=blocks, scales="learned", masks="fixed"),
                FormatRule(pattern="embed", format=table, scales="learned"),
            ),
            log_every=1,
            evaluate_every=120,
            evaluate_tokens=10_000,
        ),
        checkpoint=CheckpointConfig(every=60, keep=1),
    )
