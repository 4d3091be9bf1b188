"""Checkpoints as `transformers` keeps them, both ways: a directory with config.json and weights in safetensors.

Tensors are read one at a time, by `hsai.interop.assemble`, and written so, into as many files as the size of one asks
for, with their index. What lies beside the weights (tokenizer, chat template, generation config) travels as it is.
"""

import dataclasses
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from hsai.errors import InputError
from hsai.files import atomic_directory, read_json, write_json_atomic
from hsai.formats.storage import named_weights
from hsai.interop.assemble import Progress, disassemble
from hsai.interop.entries import Entry, check_names
from hsai.interop.families import Family
from hsai.interop.huggingface_config import read_config, write_config
from hsai.interop.safetensors_file import NAMES, TensorRecord, read_records, write_tensors
from hsai.models import Transformer, TransformerConfig
from hsai.models.transformer import abstract_transformer

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DERIVED = ("rotary_emb.inv_freq", "masked_bias", "attention.bias")
"""Ends of names of tensors that old versions of `transformers` stored though they follow from the config."""
SHARD_BYTES = 5_000_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A directory whose config and headers were read and fit together; its tensors were not read yet."""

    path: Path
    """Its directory."""

    family: Family
    """Its architecture."""

    config: TransformerConfig
    """The model."""

    raw: Mapping[str, Any]
    """What config.json holds."""

    tensors: Mapping[str, TensorRecord]
    """Every tensor of the model by its name; of a tied table, the one of the embedding only."""

    @property
    def dtype(self) -> np.dtype:
        """What weights are to be stored in so that none is rounded: bfloat16 if all are, else float32."""
        kinds = {record.dtype for record in self.tensors.values()}
        return jnp.dtype(jnp.bfloat16 if kinds == {jnp.dtype(jnp.bfloat16)} else jnp.float32)

    @property
    def files(self) -> tuple[Path, ...]:
        """Those that hold the weights."""
        return tuple(sorted({record.path for record in self.tensors.values()}))

    def list_entries(self) -> list[Entry]:
        """A tensor each, in the order of the model's layers."""
        return self.family.make_entries(self.config)

    def read(self, entry: Entry) -> np.ndarray:
        """The tensor of an entry; `InputError` if its file has become shorter since it was opened."""
        return self.tensors[entry.name].read()


def is_huggingface(directory: Path) -> bool:
    """Whether a directory is meant as a checkpoint of `transformers`: its config.json names an architecture.

    Raises `InputError` if that is not JSON.
    """
    if not (directory / CONFIG).is_file():
        return False
    raw = read_json(directory / CONFIG)
    return isinstance(raw, dict) and bool(raw.keys() & {"architectures", "model_type"})


def open_checkpoint(directory: str | os.PathLike[str]) -> Checkpoint:
    """Reads config and headers, and checks that they are one model.

    Raises:
      InputError: a file is missing, damaged, or lies about its size; the architecture, a value of the config or a
        tensor is unknown; a tensor is missing or has another shape than the config says.
    """
    directory = Path(directory)
    raw = read_json(directory / CONFIG)
    tensors = {name: at for name, at in _find_tensors(directory).items() if not name.endswith(DERIVED)}
    half = any(record.dtype.itemsize == 2 for record in tensors.values())
    try:
        family, config = read_config(raw, "bfloat16" if half else "float32")
        if config.tie_embeddings:
            tensors = _without_tied_head(tensors, family)
        blocks = config.layers * (1 if config.moe is None else config.moe.experts)
        if blocks > len(tensors):  # before all of their names are made
            raise InputError(f"{CONFIG} says {blocks} layers or experts, and there are {len(tensors)} tensors")
        entries = family.make_entries(config)
        check_names(entries, tensors)
        shapes = {name: param.get_value().shape for name, param in named_weights(abstract_transformer(config)).items()}
        for entry in entries:
            found, wanted = tensors[entry.name].shape, entry.shape(shapes[entry.leaf])
            if found != wanted:
                raise InputError(f"tensor {entry.name!r} has shape {list(found)}, {CONFIG} says {list(wanted)}")
    except InputError as error:
        raise InputError(f"{directory}: {error}") from error
    return Checkpoint(path=directory, family=family, config=config, raw=raw, tensors=tensors)


def write_huggingface(
    directory: str | os.PathLike[str],
    model: Transformer,
    *,
    dtype: DTypeLike | None = None,
    shard_bytes: int = SHARD_BYTES,
    architecture: str | None = None,
    tokens: Mapping[str, Any] | None = None,
    dequantize: bool = False,
    assets: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Family:
    """Writes a model as a checkpoint that `transformers` loads.

    Args:
      directory: to be made; there is never half a checkpoint under its name.
      model: weights that are sharded are gathered, a tensor at a time.
      dtype: of the tensors: float32, float16 or bfloat16; by default that of each of our arrays.
      shard_bytes: what the tensors of one file may add up to; a larger tensor has a file to itself.
      architecture: the one to be, if it computes this model; by default the first that does.
      tokens: bos_token_id, eos_token_id and the like, for config.json.
      dequantize: packed weights are written as the numbers that they stand for; otherwise they are refused.
      assets: further files, by name.
      overwrite: replaces a checkpoint that stands there, once the new one is whole.
      progress: called with (tensors done, tensors in all).
    Returns: the family that it was written as.
    Raises:
      InputError: no architecture is this model, a weight is packed, a number does not fit float16, the size of a file
        is not positive, or the directory exists.
    """
    if shard_bytes < 1:
        raise InputError(f"shard_bytes={shard_bytes} must be at least 1")
    family, raw = write_config(model.config, architecture)
    entries = family.make_entries(model.config)
    params = {name: param.get_value() for name, param in named_weights(model).items()}
    shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for entry in entries:
        value = params[entry.leaf]
        stored = getattr(value, "dtype", jnp.float32)  # a packed weight stands for float32 numbers
        shapes[entry.name] = (entry.shape(value.shape), jnp.dtype(stored if dtype is None else dtype))
    kinds = {kind for _, kind in shapes.values()}
    if odd := [kind for kind in kinds if kind not in NAMES]:
        raise InputError(f"dtype {odd[0]} cannot be written; valid: {', '.join(map(str, NAMES))}")
    raw["torch_dtype"] = str(shapes[family.tensors["embed"]][1])
    files = _share_out(shapes, shard_bytes)
    target = Path(os.path.abspath(directory))
    with atomic_directory(target, holding=CONFIG, overwrite=overwrite) as building:
        for name, content in (assets or {}).items():
            (building / name).write_bytes(content)
        made = _cast(disassemble(model, entries, dequantize=dequantize), shapes, len(entries), progress)
        for file, names in files.items():
            write_tensors(building / file, {name: shapes[name] for name in names}, itertools.islice(made, len(names)))
        if list(files) != [SINGLE]:
            total = sum(_size(*shape) for shape in shapes.values())
            index = {name: file for file, names in files.items() for name in names}
            write_json_atomic(building / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
        write_json_atomic(building / CONFIG, raw | dict(tokens or {}))
    return family


def _find_tensors(directory: Path) -> dict[str, TensorRecord]:
    """Every tensor of the directory's files, each where the index says, if there is one."""
    if (directory / SINGLE).is_file():
        return read_records(directory / SINGLE)
    if not (directory / INDEX).is_file():
        raise InputError(f"{directory} holds neither {SINGLE} nor {INDEX}: weights in other forms are not read")
    index = read_json(directory / INDEX)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise InputError(f"{directory / INDEX} has no weight_map from tensors to files")
    tensors: dict[str, TensorRecord] = {}
    for file in sorted(set(names.values())):
        if Path(file).name != file or not (directory / file).is_file():
            raise InputError(f"{directory / INDEX} names the file {file!r}, which is not in the directory")
        for name, record in read_records(directory / file).items():
            if names.get(name) != file:
                raise InputError(f"{directory / file} holds tensor {name!r}, which the index does not place there")
            tensors[name] = record
    if missing := sorted(set(names) - set(tensors)):
        raise InputError(f"{directory / names[missing[0]]} lacks tensor {missing[0]!r}, which the index places there")
    return tensors


def _without_tied_head(tensors: Mapping[str, TensorRecord], family: Family) -> dict[str, TensorRecord]:
    """A tied head may be stored a second time, and must then be the same."""
    embed, head = (tensors.get(family.tensors[leaf]) for leaf in ("embed", "unembed"))
    if embed is not None and head is not None:
        same = embed.shape == head.shape and embed.dtype == head.dtype and np.array_equal(embed.read(), head.read())
        if not same:
            raise InputError(f"tensor {head.name!r} is not {embed.name!r}, to which {CONFIG} ties it")
    return {name: record for name, record in tensors.items() if record is not head}


def _share_out(shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]], limit: int) -> dict[str, list[str]]:
    """The names of the files, and which tensors each holds."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, (shape, dtype) in shapes.items():
        size = _size(shape, dtype)
        if groups[-1] and held + size > limit:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    count = len(groups)
    return {f"model-{number + 1:05}-of-{count:05}.safetensors": names for number, names in enumerate(groups)}


def _size(shape: Sequence[int], dtype: np.dtype) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def _cast(
    made: Iterator[tuple[Entry, np.ndarray]],
    shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    total: int,
    progress: Progress | None,
) -> Iterator[tuple[str, np.ndarray]]:
    for number, (entry, tensor) in enumerate(made):
        dtype = shapes[entry.name][1]
        with np.errstate(over="ignore"):
            cast = tensor.astype(dtype, copy=False)
        if dtype == np.float16 and not np.isfinite(cast).all():
            raise InputError(
                f"tensor {entry.name!r} has numbers beyond the range of float16; write bfloat16 or float32"
            )
        if progress is not None:
            progress(number + 1, total)
        yield entry.name, cast
