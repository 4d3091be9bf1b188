"""A trained run as a model: what compression, export and evaluation start from."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from hsai.config import RunConfig
from hsai.configuration import from_dict
from hsai.data.tokenizer import Tokenizer
from hsai.errors import InputError
from hsai.models import Transformer
from hsai.models.transformer import abstract_transformer
from hsai.train.checkpoint import Checkpointer
from hsai.train.directory import is_run
from hsai.train.formats import begin, pack_trained
from hsai.train.origin import read_tokenizer
from hsai.train.state import fill_signs


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """The newest checkpoint of a run, without its optimizer."""

    run: RunConfig
    """The resolved config it was trained with."""

    model: Transformer
    """Float32 weights on the first device; those that were trained as if packed are packed."""

    tokenizer: Tokenizer
    """What its text was cut with."""

    step: int
    """Updates that were made."""

    data_directory: Path
    """The corpus it was trained on."""

    sources: dict[str, Any]
    """The models that went into it, as `describe_origin` says: `initialize_from`, `teacher`."""


def read_run(directory: Path) -> TrainedModel:
    """The newest checkpoint in the directory of a run; raises `InputError` if there is none or it cannot be read."""
    if not is_run(directory):
        raise InputError(f"{directory} is not the directory of a run: it has no checkpoints")
    with Checkpointer(directory / "checkpoints", None) as checkpointer:
        record = checkpointer.read_record()
        run = from_dict(RunConfig, record["config"])
        device = SingleDeviceSharding(jax.devices()[0])
        formats = run.train.formats
        shapes = jax.eval_shape(lambda model: begin(model, formats), abstract_transformer(run.model))
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
        model = checkpointer.restore(like, prefix="model.", fill_new=fill_signs)
    tokenizer = read_tokenizer(directory, record)
    return TrainedModel(
        run=run,
        model=pack_trained(model, formats),
        tokenizer=tokenizer,
        step=int(record["next_step"]),
        data_directory=Path(record["data_directory"]),
        sources=record.get("sources", {}),
    )
