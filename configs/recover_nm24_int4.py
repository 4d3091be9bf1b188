"""SmolLM2 135M, 2:4 sparse with int4 values, trained beside the dense model: recovery after one-shot compression.

    dense=$(hsai fetch smollm2-135m | tail -1)
    text=$(hsai fetch wikipedia | tail -1)
    hsai compress $dense --recipe configs/compress/joint_nm24_int4.py --out runs/smollm2/nm24_int4 \\
        --calibration $text/train.txt
    hsai train configs/recover_nm24_int4.py --data.source $text --train.initialize-from runs/smollm2/nm24_int4 \\
        --train.distill.teacher $dense
    hsai compress runs/recover_nm24_int4 --recipe configs/compress/joint_nm24_int4.py --out runs/smollm2/recovered

Masks stay those of the solver; the values that they keep and the scales are trained as the int4 codes see them, so that
the last command packs without loss, and has nothing to calibrate. Sized for less than two hours on two CPU cores.
"""

from dataclasses import replace
from pathlib import Path

from configs import models
from hsai.config import RunConfig
from hsai.data.corpus import DataConfig
from hsai.formats import Int8Config, NMInt4Config
from hsai.train.checkpoint import CheckpointConfig
from hsai.train.distill import DistillConfig
from hsai.train.formats import FormatRule
from hsai.train.loop import TrainConfig
from hsai.train.optimizer import OptimizerConfig


def get_config() -> RunConfig:
    """The experiment; its formats are those of the recipe."""
    blocks = NMInt4Config(n=2, m=4, group=64)
    return RunConfig(
        model=replace(models.smollm2_135m(), dtype="float32"),
        data=DataConfig(source="text", vocab_size=None, sequence_length=256),
        optim=OptimizerConfig(learning_rate=1e-4, warmup_steps=20, weight_decay=0.0),
        train=TrainConfig(
            steps=400,
            batch_size=4,
            initialize_from=Path("runs/smollm2/nm24_int4"),
            distill=DistillConfig(teacher=Path("runs/smollm2/dense"), share=0.9, hidden=0.1),
            formats=(
                FormatRule(pattern="layers.*", format=blocks, scales="learned", masks="fixed"),
                FormatRule(pattern="embed", format=Int8Config()),
            ),
            log_every=1,
            evaluate_every=100,
            evaluate_tokens=10_000,
        ),
        checkpoint=CheckpointConfig(every=50, keep=1),
    )
