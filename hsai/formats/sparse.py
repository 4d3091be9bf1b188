"""What sparse formats consist of: a pattern, which says what is kept and where it stands, and what values are held as.

A pattern is N:M (`hsai.formats.nm`), V:N:M (`hsai.formats.vnm`) or a bit for each weight (`hsai.formats.unstructured`);
values are floats, bytes with a scale an output, or 4-bit codes with a scale a group. A config is made of one of each, a
format of the arrays that both need.

D contraction, F outputs, C kept elements of an output, M positions of a pattern's group of which N are kept.
"""

import abc
import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from hsai.errors import InputError
from hsai.formats.codes import Group, group_absmax, round_to_codes
from hsai.formats.int8 import absmax_scale, round_to_bytes
from hsai.formats.packed import Packed, check_divides, check_finite
from hsai_kernels import densify_nm, pack_words


class Sparse(Packed):
    """Base of the formats: `values` (..., C, F), or `words` (..., C / 8, F) of 4-bit codes; arrays of the pattern; and
    of integers `scale`, float32 (..., 1, F) of bytes, bfloat16 (..., D / group, F) of codes."""

    n: int
    m: int

    @property
    def operands(self) -> dict[str, Any]:
        """The arrays as kernels name them: what is kept is `values`, in words too."""
        arrays = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if not field.metadata.get("static")
        }
        return {"values" if name == "words" else name: array for name, array in arrays.items()}

    @property
    def shape(self) -> tuple[int, ...]:
        values = self.operands["values"]
        *stack, rows, outputs = values.shape
        return (*stack, rows * (8 if values.dtype == jnp.uint32 else 1) * self.m // self.n, outputs)

    def dense(self) -> jax.Array:
        arrays: dict[str, Any] = {"scale": None} | self.operands
        return densify_nm(**arrays, n=self.n, m=self.m, size=self.shape[-2])

    def kept(self) -> jax.Array:
        """Where the format keeps a weight, be it of the value 0: bool (..., D, F)."""
        # Every value the largest, in the places that it has.
        largest = {"values": 1, "words": 0xFFFFFFFF, "scale": 1}
        present = {name: getattr(self, name) for name in largest if hasattr(self, name)}
        filled = {name: jnp.full_like(array, largest[name]) for name, array in present.items()}
        return dataclasses.replace(self, **filled).dense() != 0


class Values(abc.ABC):
    """What kept weights are held as."""

    @property
    @abc.abstractmethod
    def value_name(self) -> str:
        """For people: "bfloat16", "int8", "int4 g64"."""

    @property
    @abc.abstractmethod
    def value_bits(self) -> float:
        """Of a kept value."""

    @property
    def scale_group(self) -> int | None:
        """Dense positions along the contraction that share a scale; None of what has no such groups."""
        return None

    @abc.abstractmethod
    def scale_bits(self, contraction: int) -> float:
        """Of the scales, for each logical weight of a (contraction, F) matrix."""

    @abc.abstractmethod
    def encode(self, kept: jax.Array, scale: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """What is stored of each of (..., D, F) float32, zeros where nothing is kept; and the scale as it is stored."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseConfig(Values):
    """Base of the configs: keeps some of the weights along the contraction. Subclasses are a pattern and `Values`."""

    format: str
    """Names this format in files."""

    packed: ClassVar[type[Any]]
    """What `pack` makes, a `Sparse`."""

    @property
    @abc.abstractmethod
    def counts(self) -> tuple[int, int]:
        """(N, M)."""

    @property
    @abc.abstractmethod
    def tile(self) -> int:
        """The smallest contraction whose pattern fills whole words."""

    @property
    def width(self) -> int:
        """Neighbouring outputs that the pattern is of."""
        return 1

    @property
    @abc.abstractmethod
    def position_bits(self) -> float:
        """What the pattern takes for each logical weight."""

    @property
    @abc.abstractmethod
    def pattern_name(self) -> str:
        """For people: "2:4"."""

    @abc.abstractmethod
    def mask(self, w: jax.Array) -> jax.Array:
        """True where w (..., D, F) is kept by magnitude, bool (..., D, F)."""

    @abc.abstractmethod
    def select(self, w: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
        """What is kept, `values` (..., C, F), and the arrays that say where it stands."""

    def pack(self, w: jax.Array, mask: jax.Array | None = None, scale: jax.Array | None = None) -> Sparse:
        """Packs w (..., D, F).

        Args:
          w: float of any dtype.
          mask: bool (..., D, F), what is kept, of which there is as much as `self.mask` keeps, the default.
          scale: of integers; float32 (..., 1, F), or of codes (..., D / group, F). By default the one under which the
            largest kept weight is the highest level.
        Raises:
          InputError: a shape that pattern and groups do not divide, and numbers that `check_finite` refuses.
        """
        what = f"{self.pattern_name} sparsity"
        if self.scale_group is not None:
            what += f" with scales for {self.scale_group} positions"
        check_divides(what, max(self.tile, self.scale_group or 1), w.shape[-2], w.shape)
        if w.shape[-1] % self.width:
            raise InputError(f"{what} needs outputs that are a multiple of {self.width}; {w.shape} has {w.shape[-1]}")
        check_finite("the weight", w)
        mask = self.mask(w) if mask is None else mask
        levels, scale = self.encode(jnp.where(mask, w.astype(jnp.float32), 0.0), scale)
        arrays = self.select(levels, mask)
        if scale is not None:
            check_finite("the scale", scale, negative=self.packed.signed_scale)
            arrays["scale"] = scale
        if levels.dtype == jnp.uint8:
            arrays["words"] = pack_words(arrays.pop("values"), 4)
        n, m = self.counts
        packed: Sparse = self.packed(**arrays, n=n, m=m)
        return packed

    def invariant_bits(self, contraction: int) -> float:
        """Stored bits for each logical weight of a (contraction, F) matrix."""
        n, m = self.counts
        return n / m * self.value_bits + self.position_bits + self.scale_bits(contraction)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FloatValues(Values):
    """Kept values are floats."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """The stored precision of the kept values."""

    @property
    def value_name(self) -> str:
        return self.dtype

    @property
    def value_bits(self) -> float:
        return 8.0 * jnp.dtype(self.dtype).itemsize

    def scale_bits(self, contraction: int) -> float:
        return 0.0

    def encode(self, kept: jax.Array, scale: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        if scale is not None:
            raise ValueError(f"values of {self.dtype} have no scale")
        return kept.astype(self.dtype), None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteValues(Values):
    """Kept values are signed bytes with a float32 scale an output, as in `hsai.formats.int8`."""

    @property
    def value_name(self) -> str:
        return "int8"

    @property
    def value_bits(self) -> float:
        return 8.0

    def scale_bits(self, contraction: int) -> float:
        return 32.0 / contraction

    def encode(self, kept: jax.Array, scale: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        scale = (absmax_scale(kept) if scale is None else scale).astype(jnp.float32)
        return round_to_bytes(kept, scale), scale


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeValues(Values):
    """Kept values are 4-bit codes as in `hsai.formats.codes`, whose scales, bfloat16, span `group` *dense* positions: a
    sparse weight has the scales of its dense form."""

    group: Group = 64
    """Dense positions along the contraction that share a scale."""

    @property
    def value_name(self) -> str:
        return f"int4 g{self.group}"

    @property
    def value_bits(self) -> float:
        return 4.0

    @property
    def scale_group(self) -> int | None:
        return self.group

    def scale_bits(self, contraction: int) -> float:
        return 16.0 / self.group

    def encode(self, kept: jax.Array, scale: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        scale = (group_absmax(kept, self.group) / 7.0 if scale is None else scale).astype(jnp.bfloat16)
        return round_to_codes(kept, scale, 4), scale
