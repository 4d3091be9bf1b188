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
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.typing import DTypeLike

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
    GraphRecord,
    Manifest,
    TokenizerRecord,
    read_manifest,
    write_manifest,
)
from hsai.export.stablehlo import GraphConfig, export_graphs
from hsai.files import atomic_directory, check_replaceable, sha256
from hsai.formats.storage import describe, named_arrays, restore
from hsai.interop.assemble import ForeignModel, Progress, stream
from hsai.interop.safetensors_file import ALIGNMENT, map_tensors, write_tensors
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
    """Writes `model` and `tokenizer` as a bundle, an array at a time.

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
    # Such a file has no gaps: behind arrays that fill whole lines of memory, and wider numbers, each stands at a
    # multiple of its own size, and almost all where XLA uses them as they lie.
    arrays = dict(sorted(named_arrays(model).items(), key=lambda item: _place(item[1])))
    content = _Content(
        config=model.config,
        formats=describe(model),
        shapes={name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()},
        pieces=((name, np.asarray(array)) for name, array in arrays.items()),
    )
    config = GraphConfig() if graphs is True else graphs or None
    return _write(directory, content, tokenizer, config, extra or {}, assets or {}, overwrite)


def import_bundle(
    directory: str | os.PathLike[str],
    source: ForeignModel,
    tokenizer: Tokenizer,
    *,
    dtype: DTypeLike | None = None,
    extra: Mapping[str, Any] | None = None,
    assets: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Writes a foreign model as a bundle without graphs, from file to file: memory holds one tensor at a time.

    Args:
      directory, tokenizer, extra, assets, overwrite: as of `write_bundle`, of which it is the same bundle.
      source: the model.
      dtype, progress: as of `hsai.interop.assemble.assemble`.
    Returns: the manifest.
    Raises:
      InputError: as `write_bundle`, and as `assemble`.
    """
    model = abstract_transformer(source.config)
    kind = source.dtype if dtype is None else jnp.dtype(dtype)
    content = _Content(
        config=source.config,
        formats=describe(model),
        shapes={name: jax.ShapeDtypeStruct(leaf.shape, kind) for name, leaf in named_arrays(model).items()},
        pieces=stream(source, kind, progress),
    )
    return _write(directory, content, tokenizer, None, extra or {}, assets or {}, overwrite)


def read_bundle(directory: str | os.PathLike[str], *, verify: bool = True) -> Bundle:
    """Reads a bundle and checks it. On a CPU its weights stay where they are: in the file, mapped into memory.

    Args:
      directory: of the bundle.
      verify: compares the SHA-256 of every file; sizes are compared in any case.
    Raises:
      InputError: what `hsai.export.manifest.read_manifest` refuses; a file is missing, truncated or altered; weights or
        tokenizer do not fit the model; a weight or a scale is NaN or infinite, or a scale negative where its
        format has none such; the bundle was replaced meanwhile.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    for name, record in manifest.files.items():
        _check_file(directory / name, record, verify)
    named = manifest.tokenizer
    tokenizer = Tokenizer.load(
        directory / named.file, end_of_text=named.end_of_text, prefix=named.prefix, stops=named.stops
    )
    check_vocabulary(manifest.model, tokenizer)
    try:
        model = _load_model(directory / WEIGHTS, manifest)
    except InputError as error:
        raise InputError(f"{directory}: {error}") from error
    assets = read_assets(directory, manifest.files)
    bundle = Bundle(directory=directory, manifest=manifest, model=model, tokenizer=tokenizer, assets=assets)
    check_unchanged(bundle)
    return bundle


def check_unchanged(bundle: Bundle) -> None:
    """Raises `InputError` if another bundle has taken the place of this one since its manifest was read: for whoever
    has just read more of its files."""
    if read_manifest(bundle.directory) != bundle.manifest:
        raise InputError(f"{bundle.directory} was replaced while it was read; read it again")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Content:
    """What a bundle is to hold of a model."""

    config: TransformerConfig
    formats: Mapping[str, Mapping[str, Any]]
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    pieces: Iterable[tuple[str, np.ndarray]]
    """The arrays of `shapes`, in their order, whole or in slices; each is made when it is asked for."""


def _write(
    directory: str | os.PathLike[str],
    content: _Content,
    tokenizer: Tokenizer,
    graphs: GraphConfig | None,
    extra: Mapping[str, Any],
    assets: Mapping[str, bytes],
    overwrite: bool,
) -> Manifest:
    target = Path(os.path.abspath(directory))
    check_replaceable(target, holding=MANIFEST, overwrite=overwrite)
    check_vocabulary(content.config, tokenizer)
    if graphs is not None:
        graphs.slots(content.config)
    with atomic_directory(target, holding=MANIFEST, overwrite=overwrite) as building:
        for name, asset in assets.items():
            (building / name).write_bytes(asset)
        return _build(building, content, tokenizer, graphs, extra)


def _build(
    directory: Path, content: _Content, tokenizer: Tokenizer, config: GraphConfig | None, extra: Mapping[str, Any]
) -> Manifest:
    shapes = {name: (tuple(shape.shape), np.dtype(shape.dtype)) for name, shape in content.shapes.items()}
    write_tensors(directory / WEIGHTS, shapes, content.pieces)
    tokenizer.save(directory / TOKENIZER)
    records: tuple[GraphRecord, ...] = ()
    if config is not None:
        records = export_graphs(directory, content.config, content.formats, content.shapes, config)
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        created_by={"hsai": hsai.__version__, "jax": jax.__version__, "jaxlib": jaxlib.__version__},
        model=content.config,
        weights=content.formats,
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


def _place(array: jax.Array) -> tuple[bool, int]:
    """By which arrays are sorted in a file."""
    return bool(array.nbytes % ALIGNMENT), -array.dtype.itemsize


def check_vocabulary(config: TransformerConfig, tokenizer: Tokenizer) -> None:
    """Refuses, as `InputError`, a tokenizer with tokens that the model has no rows for."""
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
        mapped = map_tensors(path)
    except InputError as error:
        raise InputError(f"{path.name} is not a safetensors file: {error}") from error
    # A CPU takes memory that is aligned as it is, and copies other; accelerators copy all.
    arrays = {name: jax.device_put(array) for name, array in mapped.items()}
    try:
        model = restore(abstract_transformer(manifest.model), manifest.weights, arrays)
        jax.eval_shape(lambda model, tokens: model.logits(model(tokens)[0]), model, jnp.zeros((1, 1), jnp.int32))
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"weights do not fit the model: {' '.join(str(error).split())}") from error
    return model
