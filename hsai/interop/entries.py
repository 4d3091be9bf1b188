"""Entries: one tensor of a foreign file, paired with the slice of our array that it is.

Foreign files hold one tensor a layer (and an expert), outputs first: (F, D). Ours are stacked, contraction first:
(L, D, F). An entry says which slice a tensor is and how it is turned; all of it can be undone, bit for bit.

L layers, E experts, D contraction, F outputs, H head dim.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from hsai.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """Where the numbers of one foreign tensor stand in our model."""

    name: str
    """The foreign tensor."""

    leaf: str
    """Our array, by its dotted name: "layers.attention.q"."""

    index: tuple[int, ...] = ()
    """Which slice of its leading axes: (layer,), (layer, expert), or () for all of it."""

    transposed: bool = False
    """The foreign tensor has the last two axes in the other order."""

    rotary_heads: int | None = None
    """Heads of a foreign projection whose outputs are in the order of the original Llama: each rotated pair stands side
    by side, 0, H/2, 1, H/2 + 1, ..., where ours (and safetensors) have first halves before second ones."""

    offset: float = 0.0
    """What the foreign tensor has on top of ours: 1 where a gain is stored as 1 + w."""

    def shape(self, leaf: Sequence[int]) -> tuple[int, ...]:
        """The shape of the foreign tensor, from that of our array."""
        shape = tuple(leaf[len(self.index) :])
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """The foreign tensor as our slice: a view where no number has to move."""
        if self.rotary_heads is not None:
            pairs = tensor.reshape(self.rotary_heads, -1, 2, *tensor.shape[1:])
            tensor = np.swapaxes(pairs, 1, 2).reshape(tensor.shape)
        if self.transposed:
            tensor = np.swapaxes(tensor, -1, -2)
        return tensor - tensor.dtype.type(self.offset) if self.offset else tensor

    def to_foreign(self, piece: np.ndarray) -> np.ndarray:
        """Our slice as the foreign tensor: the inverse of `to_ours`."""
        if self.offset:
            piece = piece + piece.dtype.type(self.offset)
        if self.transposed:
            piece = np.swapaxes(piece, -1, -2)
        if self.rotary_heads is not None:
            halves = piece.reshape(self.rotary_heads, 2, -1, *piece.shape[1:])
            piece = np.swapaxes(halves, 1, 2).reshape(piece.shape)
        return piece


def check_names(entries: Iterable[Entry], found: Iterable[str]) -> None:
    """Refuses a file which lacks a tensor of the model, or has one that the model does not.

    Raises:
      InputError: names the first such tensor, and counts them.
    """
    wanted, stored = {entry.name: None for entry in entries}, set(found)
    missing = [name for name in wanted if name not in stored]
    unknown = sorted(stored - wanted.keys())
    if missing or unknown:
        what = f"{missing[0]!r} is missing" if missing else f"{unknown[0]!r} is unknown"
        raise InputError(f"tensors do not fit the model: {what} ({len(missing)} missing, {len(unknown)} unknown)")


def check_cover(entries: Iterable[Entry], shapes: Mapping[str, Sequence[int]]) -> None:
    """Raises ValueError, a defect of the table, unless `entries` name every slice of every array of `shapes` once."""
    slices: dict[str, list[tuple[int, ...]]] = {}
    for entry in entries:
        slices.setdefault(entry.leaf, []).append(entry.index)
    if odd := sorted(set(slices) ^ set(shapes)):
        raise ValueError(f"entries {'name' if odd[0] in slices else 'lack'} the array {odd[0]!r}")
    for leaf, shape in shapes.items():
        wanted = list(np.ndindex(*shape[: len(slices[leaf][0])]))
        if sorted(slices[leaf]) != wanted:
            raise ValueError(f"entries do not name each of the {len(wanted)} slices of {leaf!r} once")
