"""A model from foreign tensors, and foreign tensors from a model: one tensor at a time, whatever the model's size.

Each stacked array is allocated once, where it is to stay: on the devices of its sharding. A tensor is read, each device
gets its part of it, and a donated update writes that into the stack in place. So the memory of a host holds about one
tensor at any moment, next to what its devices hold. What goes to a file needs no device at all: `stream`.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from hsai.errors import InputError
from hsai.formats import Packed, Runs
from hsai.formats.storage import NAMES, named_arrays, named_weights, replace_weights
from hsai.interop.entries import Entry, check_cover
from hsai.models import Transformer, TransformerConfig
from hsai.models.transformer import abstract_transformer

Progress = Callable[[int, int], None]


class ForeignModel(Protocol):
    """A foreign model whose config and headers were read and fit together; its tensors were not read yet."""

    @property
    def path(self) -> Path:
        """Where it is: a directory or a file."""

    @property
    def config(self) -> TransformerConfig:
        """The model."""

    @property
    def dtype(self) -> np.dtype:
        """What its weights are to be stored in so that none is rounded."""

    def list_entries(self) -> list[Entry]:
        """A tensor each; together they are every array of the model."""

    def read(self, entry: Entry) -> np.ndarray:
        """The tensor of an entry as the file has it: floating, in the foreign orientation.

        Raises:
          InputError: it cannot be read; the message names the file.
        """


def assemble(
    source: ForeignModel,
    shardings: Transformer | None = None,
    dtype: DTypeLike | None = None,
    progress: Progress | None = None,
) -> Transformer:
    """A foreign model as one of ours.

    Args:
      source: each process of a run reads all of its tensors, one after the other, and keeps what its devices hold.
      shardings: the model with a sharding in the place of each array (`hsai.sharding.tree_shardings`); by default all
        of it goes to the first device.
      dtype: of our arrays; by default one that rounds none.
      progress: called with (tensors done, tensors in all).
    Raises:
      InputError: a tensor cannot be read, has another shape than the config says, is not floating, or holds a NaN or an
        infinity.
      ValueError: the entries are not the model.
    """
    entries, shapes, kind = _list(source, dtype)
    if shardings is None:
        device = SingleDeviceSharding(jax.devices()[0])
        places: Mapping[str, Sharding] = dict.fromkeys(shapes, device)
    else:
        places = named_arrays(shardings)
    values: dict[str, jax.Array] = {}
    for number, entry in enumerate(entries):
        shape, place = shapes[entry.leaf], places[entry.leaf]
        piece = _place(_read(source, entry, shape), kind, _without_leading(place, len(entry.index)))
        if entry.index:
            stack = values.pop(entry.leaf) if entry.leaf in values else _allocate(shape, kind, place)
            index = tuple(np.int32(at) for at in entry.index)
            # Waited for: tensors that are still to be copied would pile up in the host's memory.
            piece = jax.block_until_ready(_store(stack, piece, index, place))
        values[entry.leaf] = piece
        if progress is not None:
            progress(number + 1, len(entries))
    model: Transformer = replace_weights(abstract_transformer(source.config), values)
    return model


def stream(
    source: ForeignModel, dtype: DTypeLike | None = None, progress: Progress | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of `assemble` in pieces, by their dotted names: for a file, which takes them as they come.

    Args:
      source, dtype, progress: as of `assemble`, whose numbers these are, bit for bit.
    Yields: the pieces of one array after the other, in the order of `named_weights`; those of an array are slices of
      its leading axes, in their order.
    Raises:
      InputError, ValueError: as `assemble`.
    """
    entries, shapes, kind = _list(source, dtype)
    order = {name: number for number, name in enumerate(shapes)}
    entries.sort(key=lambda entry: (order[entry.leaf], entry.index))
    for number, entry in enumerate(entries):
        yield entry.leaf, np.array(_read(source, entry, shapes[entry.leaf]), kind, order="C")
        if progress is not None:
            progress(number + 1, len(entries))


def disassemble(
    model: Transformer,
    entries: Iterable[Entry],
    *,
    dequantize: bool = False,
    kept: Mapping[str, Callable[[Entry, Packed], np.ndarray]] = {},
) -> Iterator[tuple[Entry, np.ndarray]]:
    """The foreign tensors of a model, in the order of `entries`; each is made when it is asked for.

    Args:
      model: sharded weights are gathered, a slice at a time.
      entries: which tensors.
      dequantize: packed weights become the float32 numbers that they stand for.
      kept: by the names of packed weights that the foreign format holds as they are, what makes a tensor of a slice.
    Yields: an entry, and its tensor as the foreign file has it, in the dtype of our array, or as `kept` makes it.
    Raises:
      InputError: a weight is packed, and was neither to be kept nor to be dequantized.
    """
    values = {name: param.get_value() for name, param in named_weights(model).items()}
    for name, value in values.items():
        if isinstance(value, Packed) and not dequantize and name not in kept:
            raise InputError(
                f"{name} is packed as {NAMES[type(value)]}, which the foreign format does not know; "
                "export the dense model, or have it dequantized"
            )
    for entry in entries:
        value, index = values[entry.leaf], entry.index
        if isinstance(value, Runs):
            first, value = value.find(index[0])
            index = (index[0] - first, *index[1:])
        piece = jax.tree.map(lambda array, at=index: array[at] if at else array, value)
        if entry.leaf in kept:
            yield entry, kept[entry.leaf](entry, piece)
            continue
        dense = piece.dense() if isinstance(piece, Packed) else piece
        yield entry, entry.to_foreign(np.asarray(jax.device_get(dense)))


def _list(source: ForeignModel, dtype: DTypeLike | None) -> tuple[list[Entry], dict[str, tuple[int, ...]], np.dtype]:
    """Its entries, the shapes of our arrays in their order, and their dtype."""
    entries = source.list_entries()
    params = named_weights(abstract_transformer(source.config))
    shapes = {name: tuple(param.get_value().shape) for name, param in params.items()}
    check_cover(entries, shapes)
    return entries, shapes, source.dtype if dtype is None else jnp.dtype(dtype)


def _read(source: ForeignModel, entry: Entry, leaf: Sequence[int]) -> np.ndarray:
    """Our slice, checked."""
    tensor = source.read(entry)
    what = f"{source.path}: tensor {entry.name!r}"
    wanted = entry.shape(leaf)
    if tuple(tensor.shape) != wanted:
        raise InputError(f"{what} has shape {list(tensor.shape)}, the model needs {list(wanted)}")
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise InputError(f"{what} is {tensor.dtype}, and a weight is floating")
    if bad := tensor.size - np.count_nonzero(np.isfinite(tensor)):
        raise InputError(f"{what} holds {bad} values that are NaN or infinite, of {tensor.size}")
    return entry.to_ours(tensor)


def _place(piece: np.ndarray, dtype: np.dtype, place: Sharding) -> jax.Array:
    """The slice on its devices: each gets a copy of its part, in `dtype`."""

    def cut(index: Any) -> np.ndarray:
        return np.array(piece[index], dtype, order="C")

    return jax.make_array_from_callback(piece.shape, place, cut)


def _without_leading(place: Sharding, axes: int) -> Sharding:
    """The sharding of a slice of a stack."""
    if isinstance(place, NamedSharding):
        return NamedSharding(place.mesh, PartitionSpec(*place.spec[axes:]))
    return place


def _allocate(shape: tuple[int, ...], dtype: np.dtype, place: Sharding) -> jax.Array:
    stack: jax.Array = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=place)()
    return stack


@functools.partial(jax.jit, donate_argnums=0, static_argnames="place")
def _store(stack: jax.Array, piece: jax.Array, index: tuple[jax.Array, ...], place: Sharding) -> jax.Array:
    """The stack, its memory taken over, with `piece` at `index` of its leading axes."""
    start = [*index, *(jnp.int32(0) for _ in piece.shape)]
    stack = jax.lax.dynamic_update_slice(stack, piece[(None,) * len(index)], start)
    return jax.lax.with_sharding_constraint(stack, place)
