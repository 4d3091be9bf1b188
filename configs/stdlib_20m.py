"""A decoder of 21M parameters that learns Python from all of this machine's standard library, on two CPU cores.

    hsai train configs/stdlib_20m.py

A step takes 4.7 s on two cores of an AMD EPYC with AVX-512 that do nothing else (2026-11-27), 5.4 s with AVX2; it
ends at 1.148 bits a byte held out (2026-11-28).
Its widths are multiples of 256, so that llama.cpp's k-quants take all of its weights: what it loses in hsai's formats
stands beside what it loses in llama.cpp's (scripts/bench_frontier.py; docs/compression.md has the result).
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
            vocab=8192,
            embed=512,
            layers=6,
            heads=8,
            kv_heads=4,
            head_dim=64,
            mlp=1280,
            max_length=512,
            dtype="float32",
        ),
        data=DataConfig(source="python_stdlib", vocab_size=8192, sequence_length=512),
        optim=OptimizerConfig(learning_rate=2e-3, warmup_steps=100, weight_decay=0.1),
        train=TrainConfig(steps=1360, batch_size=8, log_every=10, evaluate_every=340, evaluate_tokens=50_000),
        checkpoint=CheckpointConfig(every=200, keep=1),
    )
