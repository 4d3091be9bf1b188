"""manifest.json: what stands in a bundle, in which version of the format, and how to tell that it is all there.

The manifest is written last and read first. It is plain JSON, so that a runtime in any language can follow it: the
model's config, the format of every weight in weights.safetensors, the tokenizer, the calling convention of every graph,
the size and SHA-256 of every file, and, last, its own SHA-256 (see `digest`).
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from hsai.configuration import from_data, to_dict
from hsai.errors import InputError
from hsai.files import read_json, write_json_atomic
from hsai.models import TransformerConfig

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
TOKENIZER = "tokenizer.json"
DIGEST = "sha256"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One file of the bundle."""

    bytes: int
    """Its size."""

    sha256: str
    """The SHA-256 of its content, 64 hexadecimal digits."""

    def __post_init__(self) -> None:
        if self.bytes < 0:
            raise InputError(f"bytes={self.bytes} must be at least 0")
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise InputError(f"sha256={self.sha256!r} must be 64 hexadecimal digits")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerRecord:
    """The tokenizer."""

    file: str
    """Its tokenizer.json, relative to the bundle."""

    end_of_text: str
    """The token that ends a document."""

    prefix: tuple[str, ...] | None = None
    """Tokens that stand before a text; where a manifest does not say, `end_of_text`."""

    stops: tuple[str, ...] = ()
    """Tokens by which the model says that it is done, besides `end_of_text`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayRecord:
    """One argument or result of a graph."""

    name: str
    """An array of weights.safetensors, or one of tokens, count, keys, values, lengths, key_scales,
    value_scales, logits."""

    shape: tuple[int, ...]
    """Its dimensions."""

    dtype: str
    """Its element type, as numpy and ml_dtypes name it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphRecord:
    """One graph: the model's step over a fixed number of tokens."""

    name: str
    """`decode`, or `prefill_T`."""

    step: Literal["prefill", "decode"]
    """Which of `hsai.export.steps` it computes."""

    tokens: int
    """Tokens of each row that a call takes (T); of a prefill, `count` says how many of them are meant."""

    batch: int
    """Rows of a call (B)."""

    slots: int
    """Tokens that each row of the cache holds (S)."""

    jax_file: str
    """The graph for `jax.export.deserialize`, for all of `platforms`."""

    stablehlo_file: str
    """The same graph as StableHLO's portable bytecode, for other runtimes; it has `inputs` and nothing else."""

    platforms: tuple[str, ...]
    """Where jax may run `jax_file`."""

    stablehlo_version: str
    """The version of StableHLO's portable bytecode, which every later version reads."""

    inputs: tuple[ArrayRecord, ...]
    """Arguments in calling order."""

    outputs: tuple[ArrayRecord, ...]
    """Results in order."""

    donated: tuple[int, ...]
    """Indices of `inputs` whose buffers the results of the same name may take over."""

    custom_calls: tuple[str, ...]
    """Targets that the runtime must know besides StableHLO; none in a portable graph."""

    kernels: str | None = None
    """For which target (`hsai.export.targets`) it has kernels; none of a portable graph."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of manifest.json."""

    format_version: int
    """The version of this format."""

    created_by: Mapping[str, str]
    """Versions of hsai, jax and jaxlib that wrote the bundle."""

    model: TransformerConfig
    """The model."""

    weights: Mapping[str, Mapping[str, Any]]
    """The format of every weight, as `hsai.formats.storage.describe` says it."""

    tokenizer: TokenizerRecord
    """The tokenizer."""

    graphs: tuple[GraphRecord, ...]
    """Graphs, none in a bundle that is only a model."""

    files: Mapping[str, FileRecord]
    """Every file but the manifest by its name, relative to the bundle, with forward slashes."""

    extra: Mapping[str, Any]
    """Whatever the writer wanted to say about the model (how it was compressed, what it scored); JSON."""


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Writes manifest.json into `directory`; TypeError or ValueError if `extra` is not JSON."""
    content = {
        "format_version": manifest.format_version,
        "created_by": dict(manifest.created_by),
        "model": to_dict(manifest.model),
        "weights": {name: dict(record) for name, record in manifest.weights.items()},
        "tokenizer": to_dict(manifest.tokenizer),
        "graphs": [to_dict(graph) for graph in manifest.graphs],
        "files": {name: to_dict(record) for name, record in manifest.files.items()},
        "extra": dict(manifest.extra),
    }
    write_json_atomic(directory / MANIFEST, content | {DIGEST: digest(content)})


def digest(content: Mapping[str, Any]) -> str:
    """The SHA-256 of a manifest, without the entry that holds it: of its JSON with sorted keys and no space between."""
    rest = {name: value for name, value in content.items() if name != DIGEST}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(directory: Path) -> Manifest:
    """The manifest of the bundle in `directory`.

    Raises:
      InputError: there is no such directory or no manifest in it, it is not JSON, of another version, altered, lacks a
        key or has an unknown one, holds a value of another type, or names a file that is not listed or lies outside.
    """
    path = directory / MANIFEST
    if not directory.is_dir():
        raise InputError(f"{directory} is not a bundle: there is no such directory")
    if not path.is_file():
        raise InputError(f"{directory} is not a bundle: it has no {MANIFEST}")
    content = read_json(path)
    if not isinstance(content, dict) or "format_version" not in content:
        raise InputError(f"{path} is not the manifest of a bundle: it has no format_version")
    version = content["format_version"]
    if type(version) is not int or version != FORMAT_VERSION:
        raise InputError(f"{path} has format_version {version!r}; this hsai reads version {FORMAT_VERSION}")
    if content.get(DIGEST) != (found := digest(content)):
        raise InputError(f"{path} is altered: its SHA-256 is {found}, and it says {content.get(DIGEST)}")
    try:
        manifest = _parse(content)
        _check_names(manifest)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return manifest


def _parse(content: Mapping[str, Any]) -> Manifest:
    names = [*(field.name for field in dataclasses.fields(Manifest)), DIGEST]
    if odd := sorted(set(content) ^ set(names)):
        fault = "unknown" if odd[0] in content else "missing"
        raise InputError(f"{odd[0]} is {fault}; a manifest has {', '.join(names)}")
    for name in ("created_by", "weights", "files", "extra"):
        _check_mapping(content[name], name)
    for name, record in content["weights"].items():
        _check_mapping(record, f"weights.{name}")
    return Manifest(
        format_version=content["format_version"],
        created_by={name: from_data(str, value, f"created_by.{name}") for name, value in content["created_by"].items()},
        model=from_data(TransformerConfig, content["model"], "model"),
        weights=content["weights"],
        tokenizer=from_data(TokenizerRecord, content["tokenizer"], "tokenizer"),
        graphs=from_data(tuple[GraphRecord, ...], content["graphs"], "graphs"),
        files={name: from_data(FileRecord, value, f"files.{name}") for name, value in content["files"].items()},
        extra=content["extra"],
    )


def _check_mapping(value: Any, name: str) -> None:
    if not isinstance(value, dict):
        raise InputError(f"{name}: expected an object, got {type(value).__name__}")


def _check_names(manifest: Manifest) -> None:
    """Every file lies inside the bundle, and every one that is spoken of is listed."""
    for name in manifest.files:
        if not name or "\\" in name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise InputError(f"files: {name!r} does not lie inside the bundle")
    graph_files = [name for graph in manifest.graphs for name in (graph.jax_file, graph.stablehlo_file)]
    for name in (WEIGHTS, manifest.tokenizer.file, *graph_files):
        if name not in manifest.files:
            raise InputError(f"files: {name!r} is not listed")
