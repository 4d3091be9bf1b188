"""Where a graph with kernels is to run: the platform decides which kernels are in it, and for a TPU the chip.

Nothing of the target has to be here: jax lowers for platforms that are not there, and Pallas asks no more of a chip
than its kind.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax

from hsai.errors import InputError
from hsai.sharding import MESH_AXES
from hsai_kernels.capabilities import name_chip
from hsai_kernels.dispatch import compile_for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """One of `TARGETS`."""

    platform: str
    """jax's name for what a graph is lowered for."""

    backends: str
    """`hsai_kernels`' name for the platform."""

    device_kind: str | None = None
    """jax's name for the chip, where the code of a kernel depends on it."""


TARGETS = {
    "cpu": Target(platform="cpu", backends="cpu"),
    "cuda": Target(platform="cuda", backends="gpu"),
    "rocm": Target(platform="rocm", backends="gpu"),
    "tpu-v5e": Target(platform="tpu", backends="tpu", device_kind="TPU v5 lite"),
    "tpu-v5p": Target(platform="tpu", backends="tpu", device_kind="TPU v5"),
    "tpu-v6e": Target(platform="tpu", backends="tpu", device_kind="TPU v6 lite"),
}


def check_target(name: str) -> None:
    """Raises `InputError` for a name that is none of `TARGETS`."""
    if name not in TARGETS:
        raise InputError(f"kernels={name!r} is unknown; valid are {', '.join(TARGETS)}")


def find_target() -> str | None:
    """The one of `TARGETS` that jax's default device here is, if it is one."""
    device = jax.devices()[0]
    if device.platform == "tpu":
        name = f"tpu-{name_chip(device.device_kind)}"
        return name if name in TARGETS else None
    if device.platform == "gpu":
        return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"
    return "cpu" if device.platform == "cpu" else None


@contextlib.contextmanager
def trace_for(name: str) -> Iterator[None]:
    """What is traced and lowered inside has the kernels of that target."""
    target = TARGETS[name]
    with compile_for(target.backends, target.device_kind), contextlib.ExitStack() as stack:
        if target.device_kind is not None:
            chip = jax.sharding.AbstractDevice(device_kind=target.device_kind, num_cores=1, platform=target.platform)
            mesh = jax.sharding.AbstractMesh((1,) * len(MESH_AXES), MESH_AXES, abstract_device=chip)
            stack.enter_context(jax.sharding.use_abstract_mesh(mesh))
        yield
