"""Bundles: a directory that holds one model, for any runtime, and can prove that it is whole.

    manifest.json         what is there (hsai.export.manifest); written last
    weights.safetensors   every array of the model, packed weights as they are packed
    tokenizer.json        Hugging Face's format
    chat_template.jinja   and what else came with the model (hsai.data.assets)
    graphs/               optional: prefill and decode as StableHLO (hsai.export.stablehlo)

The directory is built under a temporary name beside its own and renamed when it is complete, so there is never half a
bundle under the name that was asked for. Reading checks size and SHA-256 of every file before anything is believed.
"""

import dataclasses
import os
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
from hsai.data.assets import read_assets
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
from hsai.files import atomic_directory, atomic_write, check_replaceable, sha256
from hsai.formats.storage import describe, named_arrays, restore
from hsai.models import Transformer, TransformerConfig
from hsai.models.transformer import abstract_transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle that was read: `model` holds its weights, on jax's default device; `assets` are files by name."""

    directory: Path
    manifest: Manifest
    model: Transformer
    tokenizer: Tokenizer
    assets: dict[str, bytes]

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
    assets: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Writes `model` and `tokenizer` as a bundle.

    Args:
      directory: of the bundle; its parents are made.
      model: with weights of any formats; sharded ones are gathered.
      tokenizer: of the model's vocabulary, or of a part of it.
      graphs: which graphs are exported; True for the default ones.
      extra: anything JSON can hold, for the manifest.
      assets: further files that travel with the model as they are, by name.
      overwrite: replaces a bundle that stands there; the old one stays until the new one is complete.
    Returns: the manifest.
    Raises:
      InputError: the directory exists (and may not be overwritten, or is no bundle), the tokenizer has more tokens than
        the model, or the graphs do not fit the model.
    """
    target = Path(os.path.abspath(directory))
    check_replaceable(target, holding=MANIFEST, overwrite=overwrite)
    _check_vocabulary(model.config, tokenizer)
    config = GraphConfig() if graphs is True else graphs or None
    if config is not None:
        config.slots(model.config)
    with atomic_directory(target, holding=MANIFEST, overwrite=overwrite) as building:
        for name, content in (assets or {}).items():
            (building / name).write_bytes(content)
        manifest = _build(building, model, tokenizer, config, extra or {})
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
    named = manifest.tokenizer
    tokenizer = Tokenizer.load(
        directory / named.file, end_of_text=named.end_of_text, prefix=named.prefix, stops=named.stops
    )
    _check_vocabulary(manifest.model, tokenizer)
    try:
        model = _load_model(directory / WEIGHTS, manifest)
    except InputError as error:
        raise InputError(f"{directory}: {error}") from error
    assets = read_assets(directory, manifest.files)
    return Bundle(directory=directory, manifest=manifest, model=model, tokenizer=tokenizer, assets=assets)


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
        tokenizer=TokenizerRecord(
            file=TOKENIZER,
            end_of_text=tokenizer.name(tokenizer.eot),
            prefix=tuple(map(tokenizer.name, tokenizer.prefix)),
            stops=tuple(map(tokenizer.name, sorted(tokenizer.stops - {tokenizer.eot}))),
        ),
        graphs=records,
        files={
            path.relative_to(directory).as_posix(): FileRecord(bytes=path.stat().st_size, sha256=sha256(path))
            for path in files
        },
        extra=extra,
    )
    write_manifest(directory, manifest)
    return manifest


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
