"""What the compilers are given, and what a platform has to bring for it."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax

from hsai_kernels.tuning import Key, Sides

DTYPES = ("bfloat16", "float32")
"""Of the activations, of every case."""

Row = dict[str, Any]
"""kernel, case, dtype, chip, shape and tile (as tuning.py has them; None where a program has several), outcome, reason,
temporary_bytes, seconds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One program to compile, which asks for the platform's backend by name."""

    kernel: str
    """As the kernel calls itself where it asks for its tile; any other name for a program of several kernels."""
    name: str
    dtype: str
    """Of the activations."""
    function: Callable[..., Any]
    operands: tuple[Any, ...]
    """Trees of jax.ShapeDtypeStruct."""
    quick: bool = False
    """Small or ragged, and of every kernel one: the tests compile no other."""
    tiles: Mapping[Key, Sides] = dataclasses.field(default_factory=dict)
    """Others than the kernel's own: what the table says of them, tuning need not try."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A platform's chips, and how to compile for one of them."""

    platform: str
    chips: tuple[str, ...]
    find_device: Callable[[str], jax.Device]
    """chip -> a device to compile for, which is not there. Raises an error of jax's where the compiler is not found."""
    describe: Callable[[jax.Device], AbstractContextManager[Any]]
    """What to lower in, so that Pallas knows the chip."""
    lists: Mapping[str, Callable[[], Iterator[Case]]]
    """API -> its cases."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The compiler's."""
    strict_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """More of them, with which it refuses what it would only compile badly."""
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Of the process that compiles."""

    @property
    def kernels(self) -> tuple[str, ...]:
        """Every API that has kernels for the platform."""
        return tuple(self.lists)

    def list_cases(self, kernels: Sequence[str], *, quick: bool) -> Iterator[Case]:
        """The cases of some of `kernels`: all, or the quick ones."""
        return (case for kernel in kernels for case in self.lists[kernel]() if case.quick or not quick)
