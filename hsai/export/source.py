"""What a command accepts as a model: a training run, a bundle, a checkpoint of `transformers`, or a GGUF file."""

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from hsai.data.assets import ASSET_FILES, read_assets
from hsai.data.tokenizer import Tokenizer
from hsai.errors import InputError
from hsai.export.bundle import check_vocabulary, read_bundle
from hsai.export.manifest import MANIFEST, WEIGHTS, Manifest, read_manifest
from hsai.files import sha256
from hsai.interop.assemble import ForeignModel, assemble
from hsai.interop.assets import TOKEN_KEYS, TOKENIZER
from hsai.interop.gguf import GgufCheckpoint, is_gguf, open_gguf_checkpoint
from hsai.interop.gguf_assets import make_assets, make_tokenizer
from hsai.interop.huggingface import CONFIG, Checkpoint, is_huggingface, open_checkpoint
from hsai.models import Transformer, TransformerConfig
from hsai.models.transformer import abstract_transformer
from hsai.sharding import tree_shardings
from hsai.train.directory import is_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """What is known of a model before its weights are read."""

    directory: Path
    """Of the run, the bundle or the checkpoint; or the GGUF file."""

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
    """Weights in any format, where they were asked for."""

    tokenizer: Tokenizer
    """What its text was cut with."""

    assets: dict[str, bytes]
    """Files that travel with it as they are: chat template, generation config."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForeignSource(ModelRecord):
    """A foreign model, whose weights were not read yet, and what came with it."""

    checkpoint: ForeignModel
    """Its weights, a tensor at a time."""

    tokenizer: Tokenizer
    """As of `ModelSource`."""

    assets: dict[str, bytes]
    """As of `ModelSource`."""


def inspect_model(directory: str | os.PathLike[str]) -> ModelRecord:
    """The record of a run's newest checkpoint, of a bundle or of a foreign model, whose weights are not read.

    Raises:
      InputError: the directory holds none of them, or its record cannot be read.
    """
    directory = Path(directory)
    if is_run(directory):
        from hsai.export.run_source import inspect_run  # who runs a bundle does not wait for what trains

        return inspect_run(directory)
    if is_gguf(directory):
        return _record_gguf(open_gguf_checkpoint(directory))
    if is_huggingface(directory):
        return _record_checkpoint(open_checkpoint(directory))
    _check_is_bundle(directory)
    return _record_bundle(directory, read_manifest(directory))


def open_foreign(path: str | os.PathLike[str]) -> ForeignSource:
    """Reads all of a checkpoint of `transformers`, or of a GGUF file, but its weights.

    Raises:
      InputError: it is none of them, or damaged; its tokenizer has more tokens than the model.
    """
    path = Path(path)
    if is_gguf(path):
        file = open_gguf_checkpoint(path)
        return ForeignSource(
            **vars(_record_gguf(file)),
            checkpoint=file,
            tokenizer=make_tokenizer(file.tokenizer, str(path)),
            assets=make_assets(file.tokenizer, file.config.max_length),
        )
    if is_run(path) or not is_huggingface(path):
        what = "is no foreign model" if path.exists() else "does not exist"
        raise InputError(f"{path} {what}; give a checkpoint of transformers or a .gguf file (hsai export takes ours)")
    checkpoint = open_checkpoint(path)
    tokenizer = Tokenizer.from_huggingface(path, vocab=checkpoint.config.vocab)
    try:
        check_vocabulary(checkpoint.config, tokenizer)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    record = _record_checkpoint(checkpoint)
    return ForeignSource(**vars(record), checkpoint=checkpoint, tokenizer=tokenizer, assets=read_assets(path))


def open_model(directory: str | os.PathLike[str], *, mesh: Mesh | None = None) -> ModelSource:
    """Reads a run's newest checkpoint, a bundle, a checkpoint of `transformers`, or a GGUF file.

    Args:
      directory: of the model; weights of a foreign one get a dtype that rounds none.
      mesh: where a foreign model goes, a tensor at a time, each device getting its part; its axes must divide those of
        the model (`check_mesh`). Without one, and in any case of other models, weights go to the first device.
    Raises:
      InputError: it is none of them, or damaged.
    """
    directory = Path(directory)
    if is_run(directory):
        from hsai.export.run_source import open_run

        return open_run(directory)
    if is_gguf(directory) or is_huggingface(directory):
        foreign = open_foreign(directory)
        shardings = None if mesh is None else tree_shardings(abstract_transformer(foreign.config), mesh)
        fields = {name: value for name, value in vars(foreign).items() if name != "checkpoint"}
        return ModelSource(**fields, model=assemble(foreign.checkpoint, shardings))
    _check_is_bundle(directory)
    bundle = read_bundle(directory)
    record = _record_bundle(directory, bundle.manifest)
    return ModelSource(**vars(record), model=bundle.model, tokenizer=bundle.tokenizer, assets=bundle.assets)


def _check_is_bundle(directory: Path) -> None:
    if not (directory / MANIFEST).exists():
        what = "does not exist" if not directory.exists() else f"holds neither checkpoints nor a {MANIFEST}"
        raise InputError(f"{directory} {what}; give a training run, a bundle, a checkpoint or a .gguf file")


def _record_bundle(directory: Path, manifest: Manifest) -> ModelRecord:
    names = (WEIGHTS, manifest.tokenizer.file, *(name for name in ASSET_FILES if name in manifest.files))
    digest = join_digests(*(manifest.files[name].sha256 for name in names))
    return ModelRecord(directory=directory, config=manifest.model, origin=dict(manifest.extra), sha256=digest)


def _record_checkpoint(checkpoint: Checkpoint) -> ModelRecord:
    tokens = {key: checkpoint.raw[key] for key in TOKEN_KEYS if checkpoint.raw.get(key) is not None}
    origin = {
        "checkpoint": checkpoint.path.resolve().name,
        "architecture": checkpoint.family.architecture,
        "special_tokens": tokens,
    }
    parts = (checkpoint.path / CONFIG, *checkpoint.files, checkpoint.path / TOKENIZER)
    parts += list_asset_paths(checkpoint.path)
    digest = join_digests(*(sha256(part) for part in parts))
    return ModelRecord(directory=checkpoint.path, config=checkpoint.config, origin=origin, sha256=digest)


def _record_gguf(checkpoint: GgufCheckpoint) -> ModelRecord:
    metadata, path = checkpoint.file.metadata, checkpoint.file.path
    about = {name: metadata.get(f"general.{name}") for name in ("name", "organization", "license")}
    origin = {
        "checkpoint": path.resolve().name,
        "about": {name: value for name, value in about.items() if isinstance(value, str)},
    }
    return ModelRecord(directory=path, config=checkpoint.config, origin=origin, sha256=sha256(path))


def list_asset_paths(directory: Path) -> tuple[Path, ...]:
    """The files that travel with a model, those that are there."""
    return tuple(path for name in ASSET_FILES if (path := directory / name).is_file())


def join_digests(*digests: str) -> str:
    """One digest of several."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()
