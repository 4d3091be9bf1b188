"""A model from foreign tensors, and foreign tensors from a model: one tensor at a time, whatever the model's size.

Each stacked array is allocated once, where it is to stay: on the devices of its sharding. A tensor is read, each device
gets its part of it, and a donated update writes that into the stack in place. So the memory of a host holds about one
tensor at any moment, next to what its devices hold.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

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


def assemble(
    config: TransformerConfig,
    entries: Sequence[Entry],
    read: Callable[[Entry], np.ndarray],
    shardings: Transformer | None = None,
    dtype: DTypeLike | Mapping[str, DTypeLike] = jnp.float32,
    progress: Progress | None = None,
) -> Transformer:
    """The model of `config` with the numbers of foreign tensors.

    Args:
      config: of the model.
      entries: a tensor each; together they are every array of the model. They are read in their order.
      read: gives the tensor of an entry as the file has it: floating, in the foreign orientation. Each process of a
        run calls it for every entry, and keeps what its devices hold.
      shardings: the model with a sharding in the place of each array (`hsai.sharding.tree_shardings`); by default all
        of it goes to the first device.
      dtype: of our arrays; or that of each, by its dotted name.
      progress: called with (tensors done, tensors in all).
    Raises:
      InputError: a tensor has another shape than the config says, is not floating, or holds a NaN or an infinity.
      ValueError: the entries are not the model.
    """
    params = {name: param.get_value() for name, param in named_weights(abstract_transformer(config)).items()}
    check_cover(entries, {name: value.shape for name, value in params.items()})
    if shardings is None:
        device = SingleDeviceSharding(jax.devices()[0])
        places: Mapping[str, Sharding] = dict.fromkeys(params, device)
    else:
        places = named_arrays(shardings)
    dtypes = dtype if isinstance(dtype, Mapping) else dict.fromkeys(params, dtype)
    values: dict[str, jax.Array] = {}
    for number, entry in enumerate(entries):
        shape, place, kind = params[entry.leaf].shape, places[entry.leaf], jnp.dtype(dtypes[entry.leaf])
        piece = _place(_read(entry, read, shape), kind, _without_leading(place, len(entry.index)))
        if entry.index:
            stack = values.pop(entry.leaf) if entry.leaf in values else _allocate(shape, kind, place)
            index = tuple(np.int32(at) for at in entry.index)
            # Waited for: tensors that are still to be copied would pile up in the host's memory.
            piece = jax.block_until_ready(_store(stack, piece, index, place))
        values[entry.leaf] = piece
        if progress is not None:
            progress(number + 1, len(entries))
    model: Transformer = replace_weights(abstract_transformer(config), values)
    return model


def disassemble(
    model: Transformer, entries: Iterable[Entry], *, dequantize: bool = False
) -> Iterator[tuple[Entry, np.ndarray]]:
    """The foreign tensors of a model, in the order of `entries`; each is made when it is asked for.

    Args:
      model: sharded weights are gathered, a slice at a time.
      entries: which tensors.
      dequantize: packed weights become the float32 numbers that they stand for.
    Yields: an entry, and its tensor as the foreign file has it, in the dtype of our array.
    Raises:
      InputError: a weight is packed, and was not to be dequantized.
    """
    values = {name: param.get_value() for name, param in named_weights(model).items()}
    for name, value in values.items():
        if isinstance(value, Packed) and not dequantize:
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
        dense = piece.dense() if isinstance(piece, Packed) else piece
        yield entry, entry.to_foreign(np.asarray(jax.device_get(dense)))


def _read(entry: Entry, read: Callable[[Entry], np.ndarray], leaf: Sequence[int]) -> np.ndarray:
    """Our slice, checked."""
    tensor = read(entry)
    wanted = entry.shape(leaf)
    if tuple(tensor.shape) != wanted:
        raise InputError(f"tensor {entry.name!r} has shape {list(tensor.shape)}, the model needs {list(wanted)}")
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise InputError(f"tensor {entry.name!r} is {tensor.dtype}, and a weight is floating")
    if bad := tensor.size - np.count_nonzero(np.isfinite(tensor)):
        raise InputError(f"tensor {entry.name!r} holds {bad} values that are NaN or infinite, of {tensor.size}")
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
