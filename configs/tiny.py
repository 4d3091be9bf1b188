"""The smallest model that has every part of a large one: for tests, and for a first look at a change.

hsai train configs/tiny.py
"""

from hsai.config import RunConfig
from hsai.data.corpus import DataConfig
from hsai.models import TransformerConfig
from hsai.train.checkpoint import CheckpointConfig
from hsai.train.loop import TrainConfig
from hsai.train.optimizer import OptimizerConfig


def get_config() -> RunConfig:
    """The experiment."""
    return RunConfig(
        model=TransformerConfig(
            vocab=512,
            embed=128,
            layers=2,
            heads=2,
            kv_heads=1,
            head_dim=64,
            mlp=256,
            max_length=128,
            dtype="float32",
        ),
        data=DataConfig(source="python_stdlib", vocab_size=512, max_bytes=500_000, sequence_length=64),
        optim=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
        train=TrainConfig(steps=20, batch_size=8, log_every=1, evaluate_every=10, evaluate_tokens=4_000),
        checkpoint=CheckpointConfig(every=5, keep=2),
    )
