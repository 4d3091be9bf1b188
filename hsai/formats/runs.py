"""Runs: a stacked weight whose layers differ in format, as consecutive runs of layers that do not.

Blocks are stacked and one scan goes over them, which gives a weight one format for all layers. A budget of bytes that
is spent layer by layer gives it several. Such a weight is a stack for each run of layers of one format, and
`scan_layers` cuts the scan wherever any weight of the block changes its format: no program branches on a format, and a
model without runs is one scan. A program holds a block for each piece.

L layers, D contraction, F outputs.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from hsai.formats.layer import LayerOf, is_whole
from hsai.formats.packed import Packed, Weight, to_dense

T = TypeVar("T")
C = TypeVar("C")
Y = TypeVar("Y")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Runs(Packed):
    """parts: stacks (l, ..., D, F), dense or packed, whose layers follow one another; l adds up to L."""

    parts: tuple[Weight, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    def dense(self) -> jax.Array:
        return jnp.concatenate([to_dense(part).astype(jnp.float32) for part in self.parts])

    @property
    def starts(self) -> tuple[int, ...]:
        """The first layer of each part."""
        return tuple(itertools.accumulate((part.shape[0] for part in self.parts[:-1]), initial=0))

    def find(self, layer: int) -> tuple[int, Weight]:
        """The part that holds a layer, behind the number of that part's first layer."""
        return [pair for pair in zip(self.starts, self.parts, strict=True) if pair[0] <= layer][-1]


def stack_layers(layers: Sequence[Weight]) -> Weight:
    """The weights of single layers (..., D, F), each in a format of its own, as one stacked weight (L, ..., D, F).

    Neighbours of one format and layout share a part; where all do, there are no runs, but the format's own stack.
    """
    runs = [list(run) for _, run in itertools.groupby(layers, key=_layout)]
    parts: tuple[Weight, ...] = tuple(jax.tree.map(lambda *leaves: jnp.stack(leaves), *run) for run in runs)
    return parts[0] if len(parts) == 1 else Runs(parts)


def take_layer(stacked: T, layer: int) -> T:
    """The weights of one layer, from a tree of stacked ones."""
    return _take(stacked, layer, layer)


def scan_layers(
    step: Callable[[C, tuple[T, jax.Array]], tuple[C, Y]], carry: C, stacked: T, layers: int, *, in_place: bool = False
) -> tuple[C, Y]:
    """What `carry` becomes through all layers, and what each gave, stacked: `jax.lax.scan` of `step`.

    Args:
      step: (carry, (weights of a layer, its number int32)) -> (carry, what the layer gives).
      carry: what the first layer gets.
      stacked: a tree of weights (L, ...); those that are `Runs` cut the scan.
      layers: L.
      in_place: `step` gets packed weights as `LayerOf` their stacks, where the format allows it: for models that
        generate, without gradients, which would be those of whole stacks.
    """
    runs = [leaf for leaf in jax.tree.leaves(stacked, is_leaf=_is_runs) if _is_runs(leaf)]
    if not runs and not in_place:
        return jax.lax.scan(step, carry, (stacked, jnp.arange(layers)))
    starts = sorted({0, *(start for weight in runs for start in weight.starts)})
    given: list[Y] = []
    for start, stop in itertools.pairwise((*starts, layers)):

        def step_in_piece(carry: C, layer: jax.Array, start: int = start) -> tuple[C, Y]:
            # Indexed within the loop, as the scan itself would: a slice of a stack in front of it would be a copy.
            return step(carry, (_take(stacked, layer, start, in_place), layer))

        carry, piece = jax.lax.scan(step_in_piece, carry, jnp.arange(start, stop))
        given.append(piece)
    return carry, jax.tree.map(lambda *pieces: jnp.concatenate(pieces), *given)


def _take(stacked: T, layer: int | jax.Array, near: int, in_place: bool = False) -> T:
    """The weights of `layer`; `near` is a layer in the same run of every weight, known while the program is traced."""

    # One for all stacks that start together: products with several weights want the same.
    find_number = functools.cache(lambda first: jnp.asarray(layer - first, jnp.int32))

    def take(leaf: Any) -> Any:
        first, part = leaf.find(near) if isinstance(leaf, Runs) else (0, leaf)
        if in_place and is_whole(part):
            return LayerOf(part, find_number(first))
        return jax.tree.map(lambda array: array[layer - first], part)

    taken: T = jax.tree.map(take, stacked, is_leaf=lambda leaf: isinstance(leaf, Packed))
    return taken


def _is_runs(leaf: Any) -> bool:
    return isinstance(leaf, Runs)


def _layout(weight: Weight) -> Hashable:
    """What weights must share to be stacked: format, its static fields, and the shapes and dtypes of all arrays."""
    leaves, treedef = jax.tree.flatten(weight)
    return treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
