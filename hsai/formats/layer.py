"""LayerOf: a layer of a stacked weight that is not cut out: kernels that can read it where it lies.

Invariant: w = base[layer]. Made while a model that generates is traced (`scan_layers`), and never stored. Where a token
is all that a weight is read for, cutting it out first is most of the work.

L layers, D contraction, F outputs.
"""

import dataclasses
from typing import TypeGuard

import jax

from hsai.formats.nm import NM
from hsai.formats.packed import Packed
from hsai.formats.rounded import INTEGERS, Rounded
from hsai.formats.vnm import VNM
from hsai_kernels.stacks import cut_layer

WHOLE = (*INTEGERS, Rounded, NM, VNM)
"""Formats whose products take a layer of a stack."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerOf(Packed):
    """base (L, D, F), of `WHOLE`; layer: int32 ()."""

    base: Packed
    layer: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape[1:]

    @property
    def unit(self) -> int:
        return self.base.unit

    def cut(self) -> Packed:
        """The layer by itself: a copy."""
        return cut_layer(self.base, self.layer)

    def dense(self) -> jax.Array:
        return self.cut().dense()

    def kept(self) -> jax.Array | None:
        return self.cut().kept()


def is_whole(weight: object) -> TypeGuard[Packed]:
    """Whether a stack is one that `LayerOf` takes: of experts there are several in a layer."""
    return isinstance(weight, WHOLE) and weight.ndim == 3
