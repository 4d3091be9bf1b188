"""RunConfig: the whole of an experiment, composed from the configs that stand beside the code which reads them."""

import dataclasses

from hsai.data.corpus import DataConfig
from hsai.errors import InputError
from hsai.models import TransformerConfig
from hsai.sharding import MeshConfig
from hsai.train.checkpoint import CheckpointConfig
from hsai.train.loop import TrainConfig
from hsai.train.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """An experiment: what is trained, on what, how, and on which mesh."""

    model: TransformerConfig
    """The decoder."""

    data: DataConfig = DataConfig()
    """The text."""

    optim: OptimizerConfig = OptimizerConfig()
    """The optimizer and its schedule."""

    train: TrainConfig = TrainConfig()
    """The loop."""

    mesh: MeshConfig = MeshConfig()
    """The devices."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    """What is saved when."""

    def __post_init__(self) -> None:
        if self.train.initialize_from is None and self.data.vocab_size is None:
            raise InputError("data.vocab_size=None takes the tokenizer of train.initialize_from, which is None")
        if self.train.initialize_from is not None and self.data.vocab_size is not None:
            raise InputError(
                f"data.vocab_size={self.data.vocab_size} would learn another vocabulary than that of "
                f"train.initialize_from={str(self.train.initialize_from)!r}; set it to None"
            )
        if self.data.vocab_size is not None and self.data.vocab_size > self.model.vocab:
            raise InputError(
                f"data.vocab_size={self.data.vocab_size} exceeds model.vocab={self.model.vocab}; "
                "the embedding table must hold every token"
            )
        if self.data.sequence_length > self.model.max_length:
            raise InputError(
                f"data.sequence_length={self.data.sequence_length} exceeds model.max_length={self.model.max_length}"
            )
        if self.train.expert_balance > 0 and self.model.moe is None:
            raise InputError(
                f"train.expert_balance={self.train.expert_balance} balances experts, and the model has none (model.moe)"
            )
        if self.optim.warmup_steps >= self.train.steps:
            raise InputError(
                f"optim.warmup_steps={self.optim.warmup_steps} must be below train.steps={self.train.steps}"
            )
