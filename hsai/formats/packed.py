"""What every weight format has in common: a logical shape, a way back to dense, and an honest count of its bytes.

D contraction, F outputs; leading dimensions (layers) are allowed everywhere and written `...`.
"""

import abc
import dataclasses
import functools
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from hsai.errors import InputError

Dense = jax.Array


@dataclasses.dataclass(frozen=True)
class Packed(abc.ABC):
    """Base of the packed formats. Subclasses are frozen dataclasses registered as pytrees: arrays are leaves, the
    parameters of the layout (group, n, m) are static."""

    signed_scale: ClassVar[bool] = False
    """Whether scales may be negative, as those of 4-bit codes may (`hsai.formats.codes`)."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The logical shape (..., D, F): that of the dense weight this value stands for."""

    @abc.abstractmethod
    def dense(self) -> jax.Array:
        """The dense weight (..., D, F), float32."""

    @property
    def unit(self) -> int:
        """Positions of the contraction that must stay together where devices each get a part of it."""
        return 1

    def kept(self) -> jax.Array | None:
        """Where the format keeps a weight, be it of the value 0: bool (..., D, F); None of one that keeps all."""
        return None

    def take(self, ids: jax.Array) -> "Packed":
        """The columns that `ids` (N,) int32 name, of an array for each field with F columns."""
        return jax.tree.map(lambda leaf: jnp.take(leaf, ids, axis=-1, mode="clip"), self)

    @property
    def ndim(self) -> int:
        """The number of logical dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of logical weights."""
        return math.prod(self.shape)


Weight = Dense | Packed


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """Keeps a weight dense, in the given precision."""

    format: Literal["dense"] = "dense"
    """Names this format in files."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """The stored precision."""

    def pack(self, w: jax.Array) -> jax.Array:
        """(..., D, F) in any float dtype -> the same shape in `dtype`; `InputError` as `check_finite`."""
        w = w.astype(self.dtype)
        check_finite("the weight", w)
        return w

    def invariant_bits(self, contraction: int) -> float:
        """Stored bits for each logical weight of a (contraction, F) matrix."""
        return 8.0 * jnp.dtype(self.dtype).itemsize


def to_dense(w: Weight) -> jax.Array:
    """The dense array of any weight value; a dense one is returned as it is."""
    return _unpack(w) if isinstance(w, Packed) else w


@functools.partial(jax.jit, inline=True)
def _unpack(w: Packed) -> jax.Array:
    """One program where nothing is traced: a format's steps one by one would be a dozen to compile for each shape."""
    return w.dense()


def is_packed_as(w: Weight, format: Any) -> bool:
    """Whether a value is what `format.pack` gives for a weight of its shape: the same arrays, group and pattern."""
    if not isinstance(w, Packed):
        return False
    try:
        wanted = jax.eval_shape(format.pack, jax.ShapeDtypeStruct(w.shape, jnp.float32))
    except InputError:
        return False

    def signature(value: Any) -> Any:
        leaves, structure = jax.tree.flatten(value)
        return structure, [(tuple(leaf.shape), jnp.dtype(leaf.dtype)) for leaf in leaves]

    return bool(signature(w) == signature(wanted))


def nbytes(w: Weight) -> int:
    """Bytes that the value's arrays hold, scales and indices included."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(w))


def bits_per_weight(w: Weight) -> float:
    """Stored bits for each logical weight, scales and indices included."""
    return 8.0 * nbytes(w) / w.size


def invert_scale(scale: jax.Array) -> jax.Array:
    """1 / scale in float32, and 0 where the scale is 0 or too small to have an inverse: its weights round to zero."""
    scale = scale.astype(jnp.float32)
    return jnp.where(jnp.abs(scale) >= jnp.finfo(jnp.float32).tiny, 1.0 / scale, 0.0)


def check_finite(name: str, x: Any, *, negative: bool = True) -> None:
    """Raises `InputError` if an array holds a NaN or an infinity, or where that may not be a negative number; it says
    which.

    Only of an array whose numbers are known here. While a program is traced they are not, nor those of an array that
    several processes hold parts of: there a NaN goes through, and makes NaN of what it meets.
    """
    known = not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)
    if not known or not isinstance(x, jax.Array | np.ndarray) or not jnp.issubdtype(x.dtype, jnp.floating):
        return
    numbers = np.asarray(x)
    fine = np.isfinite(numbers)
    if not negative:
        with np.errstate(invalid="ignore"):  # of NaNs, which are found already
            fine &= ~(numbers < 0)
    if not fine.all():
        place = tuple(int(i) for i in np.unravel_index(np.argmin(fine), fine.shape))
        count = int(fine.size - np.count_nonzero(fine))
        wanted = "finite" if negative else "finite and at least 0"
        raise InputError(
            f"{name} holds {float(numbers[place]):g} at {list(place)}, and it must be {wanted} "
            f"({count} of {fine.size} numbers are not)"
        )


def check_divides(what: str, block: int, size: int, shape: tuple[int, ...]) -> None:
    """Raises `InputError` unless blocks of `block` tile the contraction of `size`."""
    if size % block:
        raise InputError(
            f"{what} needs a contraction that is a multiple of {block}; a weight of shape {shape} has {size}"
        )
