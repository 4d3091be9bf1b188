"""Chooses the backend of a kernel: the only place that branches on the platform.

Every kernel has backends by name; "reference" (plain jax.numpy) is always among them. The automatic choice tries those
of the platform, fastest first. A backend that cannot serve a call raises NotImplementedError saying what it does
support; the automatic choice then goes on to the next one and logs that once per (kernel, reason). A backend that the
caller names is used or its error raised: it never falls back.

The choice is made in Python while jax traces, so that a compiled program holds one backend and no branches.
"""

import importlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import jax

logger = logging.getLogger(__name__)

REFERENCE = "reference"
"""The backend that every kernel has on every platform."""

CHUNKED = "chunked"
"""Plain jax as well, in blocks, where the reference would need memory for all of them."""

ORDER: Mapping[str, tuple[str, ...]] = {
    "cpu": ("cpu", CHUNKED, REFERENCE),
    "gpu": ("gpu", CHUNKED, REFERENCE),
    "tpu": ("tpu", CHUNKED, REFERENCE),
}
"""Backends of the automatic choice by platform, fastest first; other platforms use the reference."""

Backend = Callable[..., jax.Array]

Result = TypeVar("Result")
"""Of a kernel: an array, or several."""

# A user context is part of the key of jit's caches: a function that was traced before `prefer` is traced again in it.
_preferred = jax.make_user_context(default_value=None)

_target = jax.make_user_context(default_value=None)

_reported: set[tuple[str, str]] = set()


class BackendMissing(NotImplementedError):
    """A backend that this platform should have is not there; falling back loses speed, so it is logged as a warning."""


def load_later(module: str, name: str) -> Backend:
    """The backend `name` of a module, which is imported when it is first called.

    Accelerators' kernels are written in Pallas: to import that takes longer than a program on a CPU may need in all.
    """

    def run(*operands: Any, **options: Any) -> jax.Array:
        backend: Backend = getattr(importlib.import_module(module), name)
        return backend(*operands, **options)

    return run


@contextmanager
def prefer(implementation: str) -> Iterator[None]:
    """Makes the automatic choice `implementation` for everything that is traced inside.

    `with prefer("reference"):` gives portable programs, without custom calls. Kernels that lack the implementation, and
    calls that it does not support, fall back to the reference as always; an explicit `implementation=` still wins.
    Raises ValueError for a name that no platform has.
    """
    known = sorted({REFERENCE, *(name for names in ORDER.values() for name in names)})
    if implementation not in known:
        raise ValueError(f"unknown implementation {implementation!r}: valid are {', '.join(known)}")
    with _preferred(implementation):
        yield


@contextmanager
def compile_for(platform: str, device_kind: str | None = None) -> Iterator[None]:
    """Chooses the backends of `platform` for everything that is traced inside, though jax's default may be another.

    For programs that are lowered for devices that are not there (jax.experimental.topologies), and, with the
    interpreter of its kernels (interpret.py), for tests. `device_kind` is jax's name for such a device, by which its
    tuned tiles are found, and what its compiler refuses (tuning.py); None takes the kernels' own tiles.
    Raises ValueError for a platform that has no backends.
    """
    if platform not in ORDER:
        raise ValueError(f"unknown platform {platform!r}: valid are {', '.join(sorted(ORDER))}")
    with _target((platform, device_kind)):
        yield


def find_platform() -> str:
    """The platform that programs traced here are for: that of `compile_for`, else jax's default."""
    target: tuple[str, str | None] | None = _target.value
    return jax.default_backend() if target is None else target[0]


def find_device_kind() -> str | None:
    """jax's name for the device that programs traced here are for; None where `compile_for` did not say."""
    target: tuple[str, str | None] | None = _target.value
    return jax.devices()[0].device_kind if target is None else target[1]


def count_devices() -> int:
    """Over how many devices the compiler is to split what is traced here: 1 without a mesh.

    And 1 inside of `jax.shard_map`, where all axes are manual: each device then runs the program on its own part.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return math.prod(size for size, kind in sizes if kind != jax.sharding.AxisType.Manual)


def check_platform(platform: str) -> None:
    """For backends: raises NotImplementedError unless programs go to one device of `platform` by default.

    On a mesh of several they do inside of `jax.shard_map`.
    """
    actual = find_platform()
    if actual != platform:
        raise NotImplementedError(f"runs on the {platform} platform only, and jax's default platform here is {actual}")
    if (devices := count_devices()) > 1:
        raise NotImplementedError(
            f"runs on one device only, and the active mesh has {devices}: jax.shard_map gives each its part"
        )


def run_kernel(
    kernel: str,
    backends: Mapping[str, Callable[..., Result]],
    implementation: str | None,
    *operands: Any,
    **options: Any,
) -> Result:
    """Calls the backend that `implementation` names, or the first of the platform's that supports the call.

    Args:
      kernel: name for messages.
      backends: name -> function of (*operands, **options); must hold "reference".
      implementation: a key of `backends`, or None for the automatic choice.

    Raises:
      ValueError: unknown implementation, naming the valid ones.
      NotImplementedError: the implementation was named explicitly and does not support this call.
    """
    if implementation is not None:
        if implementation not in backends:
            valid = ", ".join(sorted(backends))
            raise ValueError(f"unknown implementation {implementation!r} of {kernel}: valid are {valid}")
        return backends[implementation](*operands, **options)
    for name in list_candidates():
        if name == REFERENCE or name not in backends:
            continue
        try:
            return backends[name](*operands, **options)
        except NotImplementedError as error:
            _report_fallback(kernel, name, error)
    return backends[REFERENCE](*operands, **options)


def list_candidates() -> tuple[str, ...]:
    """Names that the automatic choice tries, in order."""
    preferred: str | None = _preferred.value
    if preferred is not None:
        return (preferred,)
    return ORDER.get(find_platform(), (REFERENCE,))


def _report_fallback(kernel: str, name: str, error: NotImplementedError) -> None:
    """Logs, once per (kernel, reason), that `name` could not be used."""
    reason = f"{name}: {error}"
    if (kernel, reason) in _reported:
        return
    _reported.add((kernel, reason))
    level = logging.WARNING if isinstance(error, BackendMissing) else logging.INFO
    logger.log(level, "%s uses another backend than %s", kernel, reason)
