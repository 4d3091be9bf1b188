"""Rounded: a weight of integers whose products round their other side to 8 bits as well, and so are integers whole.

Invariant: w = base; x @ w is taken as round(x) @ w, where every row's group of positions that shares a scale in w (all
of them in Int8) gets a scale of its own, by its largest magnitude, whenever it comes: nothing is calibrated. What
llama.cpp and ONNX Runtime always do; here who asks for it. Bits are those of the base.

On a CPU the products of integers are two to four times faster for many rows, and somewhat faster for one. TPUs and GPUs
have kernels for weights that are not sparse, whose speed is not known; where no kernel serves, plain jax adds integers.
"""

import dataclasses
from typing import Literal

import jax

from hsai.formats.codes import Codes
from hsai.formats.int4_offset import Int4Offset
from hsai.formats.int8 import Int8
from hsai.formats.nm import NMInt4, NMInt8
from hsai.formats.packed import Packed
from hsai.formats.ternary import Ternary
from hsai.formats.vnm import VNMInt4, VNMInt8

Activations = Literal["float", "int8"]
"""How products take what they multiply weights of integers by: as it is, or rounded."""

INTEGERS = (Int8, Codes, Int4Offset, Ternary, NMInt8, NMInt4, VNMInt8, VNMInt4)
"""Formats that can be the base."""

BITS = 8
"""Of a rounded activation."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rounded(Packed):
    """base (..., D, F), of `INTEGERS`."""

    base: Packed

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def unit(self) -> int:
        return self.base.unit

    def dense(self) -> jax.Array:
        return self.base.dense()

    def kept(self) -> jax.Array | None:
        return self.base.kept()
