"""A decoder of 5M parameters that learns Python from this machine's standard library, on two CPU cores.

    hsai train configs/quickstart.py

Sharded over 2 devices that the CPU pretends to have. Part of `bash scripts/quickstart.sh`, which goes on to compress
and export it; README.md has the result.
"""

from hsai.config import RunConfig
from hsai.data.corpus import DataConfig
from hsai.models import TransformerConfig
from hsai.sharding import MeshConfig
from hsai.train.checkpoint import CheckpointConfig
from hsai.train.loop import TrainConfig
from hsai.train.optimizer import OptimizerConfig


def get_config() -> RunConfig:
    """The experiment."""
    return RunConfig(
        model=TransformerConfig(
            vocab=4096,
            embed=256,
            layers=5,
            heads=4,
            kv_heads=2,
            head_dim=64,
            mlp=768,
            max_length=512,
            dtype="float32",
        ),
        data=DataConfig(source="python_stdlib", vocab_size=4096, max_bytes=16_000_000, sequence_length=256),
        optim=OptimizerConfig(learning_rate=3e-3, warmup_steps=30, weight_decay=0.1),
        train=TrainConfig(steps=300, batch_size=4, log_every=1, evaluate_every=100, evaluate_tokens=25_000),
        mesh=MeshConfig(data=-1, model=2, cpu_devices=2),
        checkpoint=CheckpointConfig(every=100, keep=2),
    )
