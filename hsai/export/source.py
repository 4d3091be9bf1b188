"""What a command accepts as a model: the directory of a training run, or a bundle."""

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

from hsai.config import RunConfig
from hsai.configuration import from_dict, to_dict
from hsai.data.assets import ASSET_FILES, Assets
from hsai.data.tokenizer import Tokenizer
from hsai.errors import InputError
from hsai.export.bundle import read_bundle
from hsai.export.manifest import MANIFEST, WEIGHTS, Manifest, read_manifest
from hsai.files import sha256
from hsai.models import Transformer, TransformerConfig
from hsai.train.checkpoint import Checkpointer, is_run
from hsai.train.restore import read_run
from hsai.train.seal import SEAL


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """What is known of a model before its weights are read."""

    directory: Path
    """Of the run or the bundle."""

    config: TransformerConfig
    """The decoder."""

    origin: dict[str, Any]
    """JSON that travels from bundle to bundle: run, step, corpus, sequence_length, and what was done since."""

    sha256: str
    """Of its weights, tokenizer and assets: what was made of a model with the same value need not be made again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSource(ModelRecord):
    """A model that was read from disk, and where it came from."""

    model: Transformer
    """Weights in any format, on the first device."""

    tokenizer: Tokenizer
    """What its text was cut with."""

    assets: Assets
    """Its chat template and configs; none of a run."""


def inspect_model(directory: str | os.PathLike[str]) -> ModelRecord:
    """The record of a run's newest checkpoint, or of a bundle, whose weights are not read.

    Raises:
      InputError: the directory holds neither, or its record cannot be read.
    """
    directory = Path(directory)
    if is_run(directory):
        with Checkpointer(directory / "checkpoints", None) as checkpointer:
            record = checkpointer.read_record()
        run = from_dict(RunConfig, record["config"])
        return _record_run(directory, run, int(record["next_step"]), record["data_directory"])
    _check_is_bundle(directory)
    return _record_bundle(directory, read_manifest(directory))


def open_model(directory: str | os.PathLike[str]) -> ModelSource:
    """Reads a run's newest checkpoint, or a bundle; raises `InputError` if it is neither, or damaged."""
    directory = Path(directory)
    if is_run(directory):
        trained = read_run(directory)
        record = _record_run(directory, trained.run, trained.step, str(trained.data_directory))
        return ModelSource(**vars(record), model=trained.model, tokenizer=trained.tokenizer, assets=Assets())
    _check_is_bundle(directory)
    bundle = read_bundle(directory)
    record = _record_bundle(directory, bundle.manifest)
    return ModelSource(**vars(record), model=bundle.model, tokenizer=bundle.tokenizer, assets=bundle.assets)


def _check_is_bundle(directory: Path) -> None:
    if not (directory / MANIFEST).exists():
        what = "does not exist" if not directory.exists() else f"holds neither checkpoints nor a {MANIFEST}"
        raise InputError(f"{directory} {what}; give the directory of a training run or of a bundle")


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
    names = (WEIGHTS, manifest.tokenizer.file, *(name for name in ASSET_FILES if name in manifest.files))
    digest = _join(*(manifest.files[name].sha256 for name in names))
    return ModelRecord(directory=directory, config=manifest.model, origin=dict(manifest.extra), sha256=digest)


def _join(*digests: str) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()
