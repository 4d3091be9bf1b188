"""Products with packed weights, on one device: which kernel has which format.

D contraction, F outputs.
"""

from collections.abc import Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp

from hsai.formats.codes import Codes
from hsai.formats.int4_offset import Int4Offset
from hsai.formats.int8 import Int8
from hsai.formats.layer import LayerOf
from hsai.formats.nm import NM, NMInt4, NMInt8
from hsai.formats.observed import Observed, Tapped
from hsai.formats.outliers import Outliers
from hsai.formats.packed import Packed, Weight
from hsai.formats.rounded import BITS, Rounded
from hsai.formats.ternary import Ternary
from hsai.formats.unstructured import Unstructured, UnstructuredInt4, UnstructuredInt8
from hsai.formats.vnm import VNM, VNMInt4, VNMInt8
from hsai_kernels import quantized_matmuls, sparse_matmuls


def are_alike(weights: Sequence[Weight]) -> TypeGuard[Sequence[Packed]]:
    """Whether `multiply_packed` takes weights together: packed in one format, and different in their columns only."""

    def describe(w: Weight) -> Any:
        leaves, structure = jax.tree.flatten(w)
        # Layers of stacks are read in one place if they are the same number.
        layer = id(w.layer) if isinstance(w, LayerOf) else None
        return structure, layer, [(leaf.shape[:-1], leaf.dtype) for leaf in leaves]

    if any(not isinstance(w, Packed) or isinstance(w, Outliers | Observed | Tapped) for w in weights):
        return False
    return all(describe(w) == describe(weights[0]) for w in weights)


def multiply_packed(x: jax.Array, *weights: Packed, implementation: str | None = None) -> tuple[jax.Array, ...]:
    """x @ w for (..., D) and each (D, F), in x's dtype, on one device; weights must be alike (`are_alike`).

    `implementation` names a backend of the kernels, which then raises NotImplementedError for what it does not have.
    """
    how: dict[str, Any] = {"implementation": implementation}
    alike: tuple[Any, ...] = weights
    if isinstance(alike[0], LayerOf):
        how["layer"], alike = alike[0].layer, tuple(w.base for w in alike)
    if isinstance(alike[0], Rounded):
        how["activation_bits"], alike = BITS, tuple(w.base for w in alike)
    match w := alike[0]:
        case Int8():
            return quantized_matmuls(x, [(w.values, w.scale, None) for w in alike], **how)
        case Codes(bits=bits, centered=centered):
            return quantized_matmuls(x, [(w.words, w.scale, None) for w in alike], bits=bits, centered=centered, **how)
        case Int4Offset():
            return quantized_matmuls(x, [(w.words, w.scale, w.minimum) for w in alike], **how)
        case Ternary():
            return quantized_matmuls(x, [(w.words, w.scale, None) for w in alike], bits=2, **how)
        case NM() | NMInt8() | NMInt4() | VNM() | VNMInt8() | VNMInt4():
            arrays = ("values", "indices", "scale", "choices")
            operands = [tuple(map(w.operands.get, arrays)) for w in alike]
            return sparse_matmuls(x, operands, n=w.n, m=w.m, **how)
        case Unstructured() | UnstructuredInt8() | UnstructuredInt4():
            if implementation is not None:
                raise NotImplementedError("products rebuild the dense weight")
            dense = (w.dense().astype(x.dtype) for w in alike)
            return tuple(jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(x.dtype) for w in dense)
        case _:
            raise NotImplementedError(f"project does not know the format {type(w).__name__}")
