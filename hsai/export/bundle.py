"""Bundles: a directory that holds one model, for any runtime, and can prove that it is whole.

    manifest.json         what is there (hsai.export.manifest); written last
    weights.safetensors   every array of the model, packed weights as they are packed
    tokenizer.json        Hugging Face's format
    graphs/               optional: prefill and decode as StableHLO (hsai.export.stablehlo)

The directory is built under a temporary name beside its own and renamed when it is complete, so there is never half a
bundle under the name that was asked for. Reading checks size and SHA-256 of every file before anything is believed.
"""

import dataclasses
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import safetensors
import safetensors.flax
import safetensors.numpy

import hsai
from hsai.data.tokenizer import Tokenizer
from hsai.errors import InputError
from hsai.export.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    TOKENIZER,
    WEIGHTS,
    FileRecord,
    Manifest,
    TokenizerRecord,
    read_manifest,
    write_manifest,
)
from hsai.export.stablehlo import GraphConfig, export_graphs
from hsai.files import atomic_write, flush, read_json, sha256
from hsai.formats.storage import describe, named_arrays, restore
from hsai.models import Transformer, TransformerConfig
from hsai.models.transformer import abstract_transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle that was read: `model` holds its weights, on jax's default device."""

    directory: Path
    manifest: Manifest
    model: Transformer
    tokenizer: Tokenizer

    @property
    def config(self) -> TransformerConfig:
        """The model's config."""
        return self.manifest.model


def write_bundle(
    directory: str | os.PathLike[str],
    model: Transformer,
    tokenizer: Tokenizer,
    *,
    graphs: bool | GraphConfig = False,
    extra: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Writes `model` and `tokenizer` as a bundle.

    Args:
      directory: of the bundle; its parents are made.
      model: with weights of any formats; sharded ones are gathered.
      tokenizer: of the model's vocabulary, or of a part of it.
      graphs: which graphs are exported; True for the default ones.
      extra: anything JSON can hold, for the manifest.
      overwrite: replaces a bundle that stands there; the old one stays until the new one is complete.
    Returns: the manifest.
    Raises:
      InputError: the directory exists (and may not be overwritten, or is no bundle), the tokenizer has more tokens than
        the model, or the graphs do not fit the model.
    """
    target = Path(os.path.abspath(directory))
    _check_target(target, overwrite)
    _check_vocabulary(model.config, tokenizer)
    config = GraphConfig() if graphs is True else graphs or None
    if config is not None:
        config.slots(model.config)
    target.parent.mkdir(parents=True, exist_ok=True)
    building = target.with_name(f".{target.name}.{secrets.token_hex(6)}")
    building.mkdir()
    try:
        manifest = _build(building, model, tokenizer, config, extra or {})
        _publish(building, target)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return manifest


def read_bundle(directory: str | os.PathLike[str], *, verify: bool = True) -> Bundle:
    """Reads a bundle and checks it.

    Args:
      directory: of the bundle.
      verify: compares the SHA-256 of every file; sizes are compared in any case.
    Raises:
      InputError: what `hsai.export.manifest.read_manifest` refuses; a file is missing, truncated or altered; weights or
        tokenizer do not fit the model; a weight or a scale is NaN or infinite, or a scale negative.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    for name, record in manifest.files.items():
        _check_file(directory / name, record, verify)
    tokenizer = Tokenizer.load(directory / manifest.tokenizer.file, end_of_text=manifest.tokenizer.end_of_text)
    _check_vocabulary(manifest.model, tokenizer)
    try:
        model = _load_model(directory / WEIGHTS, manifest)
    except InputError as error:
        raise InputError(f"{directory}: {error}") from error
    return Bundle(directory=directory, manifest=manifest, model=model, tokenizer=tokenizer)


def _build(
    directory: Path,
    model: Transformer,
    tokenizer: Tokenizer,
    config: GraphConfig | None,
    extra: Mapping[str, Any],
) -> Manifest:
    arrays, formats = named_arrays(model), describe(model)
    with atomic_write(directory / WEIGHTS) as temporary:
        # safetensors writes a buffer as it lies in memory, whatever its strides say.
        safetensors.numpy.save_file({n: np.ascontiguousarray(np.asarray(a)) for n, a in arrays.items()}, temporary)
    tokenizer.save(directory / TOKENIZER)
    records = export_graphs(directory, model.config, formats, arrays, config) if config is not None else ()
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        created_by={"hsai": hsai.__version__, "jax": jax.__version__, "jaxlib": jaxlib.__version__},
        model=model.config,
        weights=formats,
        tokenizer=TokenizerRecord(file=TOKENIZER, end_of_text=_name_end_of_text(directory / TOKENIZER, tokenizer.eot)),
        graphs=records,
        files={
            path.relative_to(directory).as_posix(): FileRecord(bytes=path.stat().st_size, sha256=sha256(path))
            for path in files
        },
        extra=extra,
    )
    write_manifest(directory, manifest)
    return manifest


def _publish(building: Path, target: Path) -> None:
    """Renames `building` to `target`; a bundle that stands there steps aside, and back if that fails."""
    aside = building.with_name(f"{building.name}.old")
    exists = target.exists()
    if exists:
        os.rename(target, aside)
    try:
        os.rename(building, target)
    except BaseException:
        if exists:
            os.rename(aside, target)
        raise
    flush(target.parent)
    if exists:
        # The new bundle stands; what cannot be removed of the old one is no reason to say that it does not.
        shutil.rmtree(aside, ignore_errors=True)


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"{target} is a file; give the name of a directory")
    if not overwrite:
        raise InputError(f"{target} exists; choose another name, or say --overwrite (overwrite=True)")
    if any(target.iterdir()) and not (target / MANIFEST).is_file():
        raise InputError(f"{target} is not overwritten: it is not a bundle (it has no {MANIFEST}); choose another name")


def _check_vocabulary(config: TransformerConfig, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > config.vocab:
        raise InputError(f"the tokenizer has {tokenizer.vocab_size} tokens, more than model.vocab={config.vocab}")


def _check_file(path: Path, record: FileRecord, verify: bool) -> None:
    if not path.is_file():
        raise InputError(f"{path} is missing from the bundle")
    size = path.stat().st_size
    if size != record.bytes:
        fault = "truncated" if size < record.bytes else "altered"
        raise InputError(f"{path} is {fault}: it has {size} bytes, and the manifest says {record.bytes}")
    if verify and (found := sha256(path)) != record.sha256:
        raise InputError(f"{path} is altered: its SHA-256 is {found}, and the manifest says {record.sha256}")


def _load_model(path: Path, manifest: Manifest) -> Transformer:
    """The model with its weights; what they lack shows when the model is traced, at no cost."""
    try:
        arrays = safetensors.flax.load_file(path)
    except safetensors.SafetensorError as error:
        raise InputError(f"{path.name} is not a safetensors file: {error}") from error
    try:
        model = restore(abstract_transformer(manifest.model), manifest.weights, arrays)
        jax.eval_shape(lambda model, tokens: model.logits(model(tokens)[0]), model, jnp.zeros((1, 1), jnp.int32))
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"weights do not fit the model: {' '.join(str(error).split())}") from error
    return model


def _name_end_of_text(path: Path, eot: int) -> str:
    """How the tokenizer file spells the token `eot`."""
    for token in read_json(path)["added_tokens"]:
        if token["id"] == eot:
            return str(token["content"])
    raise InputError(f"token {eot}, the tokenizer's end of text, is not among its added tokens")
