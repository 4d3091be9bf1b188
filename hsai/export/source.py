"""What a command accepts as a model: the directory of a training run, a bundle, or a checkpoint of `transformers`."""

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

from hsai.config import RunConfig
from hsai.configuration import from_dict, to_dict
from hsai.data.tokenizer import Tokenizer
from hsai.errors import InputError
from hsai.export.bundle import read_bundle
from hsai.export.manifest import MANIFEST, WEIGHTS, Manifest, read_manifest
from hsai.files import sha256
from hsai.interop.assemble import Progress
from hsai.interop.assets import TOKEN_KEYS, TOKENIZER, read_assets, read_tokenizer
from hsai.interop.huggingface import CONFIG, Checkpoint, is_huggingface, open_checkpoint, read_huggingface
from hsai.models import Transformer, TransformerConfig
from hsai.train.checkpoint import Checkpointer, is_run
from hsai.train.restore import read_run
from hsai.train.seal import SEAL


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """What is known of a model before its weights are read."""

    directory: Path
    """Of the run, the bundle or the checkpoint."""

    config: TransformerConfig
    """The decoder."""

    origin: dict[str, Any]
    """JSON that travels from bundle to bundle: run, step, corpus, sequence_length, and what was done since."""

    sha256: str
    """Of its weights and its tokenizer: what was made of a model with the same value need not be made again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSource(ModelRecord):
    """A model that was read from disk, and where it came from."""

    model: Transformer
    """Weights in any format, on the first device."""

    tokenizer: Tokenizer
    """What its text was cut with."""

    assets: dict[str, bytes]
    """Files that travel with it as they are: chat template, generation config."""


def inspect_model(directory: str | os.PathLike[str]) -> ModelRecord:
    """The record of a run's newest checkpoint, of a bundle or of a foreign checkpoint, whose weights are not read.

    Raises:
      InputError: the directory holds none of them, or its record cannot be read.
    """
    directory = Path(directory)
    if is_run(directory):
        with Checkpointer(directory / "checkpoints", None) as checkpointer:
            record = checkpointer.read_record()
        run = from_dict(RunConfig, record["config"])
        return _record_run(directory, run, int(record["next_step"]), record["data_directory"])
    if is_huggingface(directory):
        return _record_checkpoint(open_checkpoint(directory))
    _check_is_bundle(directory)
    return _record_bundle(directory, read_manifest(directory))


def open_model(
    directory: str | os.PathLike[str], *, dtype: str | None = None, progress: Progress | None = None
) -> ModelSource:
    """Reads a run's newest checkpoint, a bundle, or a checkpoint of `transformers`.

    Args:
      directory: of the model.
      dtype: of the weights of a foreign checkpoint, by default one that rounds none; others have theirs.
      progress: called with (tensors done, tensors in all) of a foreign checkpoint.
    Raises:
      InputError: it is none of them, or damaged; or a dtype is given for a run or a bundle.
    """
    directory = Path(directory)
    if is_huggingface(directory):
        checkpoint = open_checkpoint(directory)
        return ModelSource(
            **vars(_record_checkpoint(checkpoint)),
            tokenizer=read_tokenizer(directory, checkpoint.raw),
            model=read_huggingface(checkpoint, dtype=dtype, progress=progress),
            assets=read_assets(directory),
        )
    if dtype is not None:
        raise InputError(
            f"dtype {dtype}: {directory} is no foreign checkpoint; hsai compress changes the weights of ours"
        )
    if is_run(directory):
        trained = read_run(directory)
        record = _record_run(directory, trained.run, trained.step, str(trained.data_directory))
        return ModelSource(**vars(record), model=trained.model, tokenizer=trained.tokenizer, assets={})
    _check_is_bundle(directory)
    bundle = read_bundle(directory)
    record = _record_bundle(directory, bundle.manifest)
    return ModelSource(**vars(record), model=bundle.model, tokenizer=bundle.tokenizer, assets=bundle.assets)


def _check_is_bundle(directory: Path) -> None:
    if not (directory / MANIFEST).exists():
        what = "does not exist" if not directory.exists() else f"holds neither checkpoints nor a {MANIFEST}"
        raise InputError(f"{directory} {what}; give the directory of a training run, a bundle or a checkpoint")


def _record_run(directory: Path, run: RunConfig, step: int, data_directory: str) -> ModelRecord:
    origin = {
        "run": directory.name,
        "step": step,
        "corpus": data_directory,
        "sequence_length": run.data.sequence_length,
        "training": to_dict(run),
    }
    seal, tokenizer = directory / "checkpoints" / str(step) / SEAL, directory / "tokenizer.json"
    digest = _join(sha256(seal), sha256(tokenizer))
    return ModelRecord(directory=directory, config=run.model, origin=origin, sha256=digest)


def _record_bundle(directory: Path, manifest: Manifest) -> ModelRecord:
    digest = _join(manifest.files[WEIGHTS].sha256, manifest.files[manifest.tokenizer.file].sha256)
    return ModelRecord(directory=directory, config=manifest.model, origin=dict(manifest.extra), sha256=digest)


def _record_checkpoint(checkpoint: Checkpoint) -> ModelRecord:
    tokens = {key: checkpoint.raw[key] for key in TOKEN_KEYS if checkpoint.raw.get(key) is not None}
    origin = {
        "checkpoint": checkpoint.directory.resolve().name,
        "architecture": checkpoint.family.architecture,
        "special_tokens": tokens,
    }
    parts = (checkpoint.directory / CONFIG, *checkpoint.files, checkpoint.directory / TOKENIZER)
    digest = _join(*(sha256(part) for part in parts))
    return ModelRecord(directory=checkpoint.directory, config=checkpoint.config, origin=origin, sha256=digest)


def _join(*digests: str) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()
