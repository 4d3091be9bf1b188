"""Logical axes to mesh axes: the only rules that name both.

A weight or activation names what its dimensions *are* (`"embed"`, `"mlp"`, `"batch"`). A `MeshConfig` says which mesh
axes exist and how large they are; `RULES` says which of them each logical axis may be laid over. Everything else is
derived: the shardings of parameters, of optimizer state (its moments carry the same axes as their parameters), of
batches and of key/value caches.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import flax
import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hsai.errors import InputError

# Module attributes declare logical axes ("embed", "mlp"); this file alone turns them into mesh axes, for real or absent
# devices. With eager sharding on, nnx would read the logical names as mesh axes and refuse them. Off for every thread:
# what nnx.use_eager_sharding says holds for the one that says it.
flax.config.update("flax_always_shard_variable", False)

Axes = tuple[str | None, ...]
T = TypeVar("T")

MESH_AXES = ("data", "fsdp", "model")
MOST_CPU_DEVICES = 1024
"""Each is threads of this machine: with many thousands it stands still."""

# Logical axis -> the mesh axes it is split over, outermost first. A logical axis that is not named here is a typing
# error and refused; one that maps to () is replicated on purpose. Within one array a mesh axis is used once: the first
# logical axis that claims it keeps it, so an activation ("batch", "seq", "embed") is split over its batch only, while
# a weight ("embed", "mlp") is split over both.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "seq": (),
    "cache": (),
    "layers": (),
    "embed": ("fsdp",),
    "experts": ("model",),
    "mlp": ("model",),
    "heads": ("model",),
    "kv_heads": ("model",),
    "head_dim": (),
    "vocab": ("model",),
    # Of calibration: the rows of a Gram matrix, and the outputs of a weight that solvers treat each for itself.
    "gram": ("data", "fsdp", "model"),
    "columns": ("data", "fsdp", "model"),
}

# Key and value heads may be fewer than the devices of a tensor-parallel group: several devices then use the same head.
SHARED_AXES = ("kv_heads",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the device mesh; at most one may be -1, and takes what the others leave."""

    data: int = -1
    """Replicas: each holds a copy of the weights and its own part of the batch; -1 takes what the others leave."""

    fsdp: int = 1
    """Devices over which weights and optimizer state are split, gathered as needed; they split the batch as well."""

    model: int = 1
    """Devices over which heads, feed-forward width and vocabulary are split (tensor parallelism)."""

    cpu_devices: int = 1
    """How many devices a CPU-only machine pretends to have; real accelerators are never affected."""

    def __post_init__(self) -> None:
        sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
        for axis, size in sizes.items():
            if size == 0 or size < -1:
                raise InputError(f"mesh.{axis}={size} must be a positive size, or -1 to infer it")
        inferred = [axis for axis, size in sizes.items() if size == -1]
        if len(inferred) > 1:
            raise InputError(f"mesh.{inferred[0]} and mesh.{inferred[1]} are both -1; only one size can be inferred")
        if not 1 <= self.cpu_devices <= MOST_CPU_DEVICES:
            raise InputError(f"mesh.cpu_devices={self.cpu_devices} must be between 1 and {MOST_CPU_DEVICES}")

    def shape(self, device_count: int) -> tuple[int, ...]:
        """The size of each axis of MESH_AXES on `device_count` devices; raises `InputError` if they do not divide."""
        sizes = [getattr(self, axis) for axis in MESH_AXES]
        fixed = math.prod(size for size in sizes if size != -1)
        stated = " x ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
        if -1 in sizes:
            axis = MESH_AXES[sizes.index(-1)]
            if device_count % fixed:
                raise InputError(
                    f"mesh {stated}: mesh.{axis} cannot be inferred, {device_count} devices do not divide by {fixed}"
                )
            sizes[sizes.index(-1)] = device_count // fixed
        elif fixed != device_count:
            raise InputError(f"mesh {stated} needs {fixed} devices, and there are {device_count}")
        return tuple(sizes)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config` over `devices` (default: all of this run's, of every process)."""
    if devices is None:
        try:
            shape = config.shape(jax.device_count())
        except InputError as error:
            if jax.default_backend() != "cpu":
                raise
            raise InputError(f"{error}; on a CPU, mesh.cpu_devices says how many there are") from error
        return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    grid = np.asarray(devices, dtype=object).reshape(config.shape(len(devices)))
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def check_mesh(mesh: Mesh, sizes: Mapping[str, int]) -> None:
    """Refuses a mesh that does not cut a model into equal parts.

    `partition_spec` would leave such an axis whole: every device then holds and computes all of it, which on a pod is
    a model that does not fit, or chips that all do the same. And it knows arrays, not heads: half a head to a device
    looks even to it, and costs an exchange in each layer.

    Args:
      mesh: of the run.
      sizes: how many units each logical axis of the weights has, such as {"heads": 32, "mlp": 14336}.
    Raises:
      InputError: names the mesh axis, the axis of the model, both sizes, and the sizes that every axis would take.
    """

    def fits(axis: str, parts: int) -> bool:
        size = sizes[axis]
        return size % parts == 0 or (axis in SHARED_AXES and parts % size == 0)

    for axis, size in sizes.items():
        for mesh_axis in RULES[axis]:
            parts = mesh.shape[mesh_axis]
            if fits(axis, parts):
                continue
            split = [other for other in sizes if mesh_axis in RULES[other]]
            valid = [n for n in range(1, mesh.size + 1) if all(fits(other, n) for other in split)]
            raise InputError(
                f"mesh.{mesh_axis}={parts} does not divide model.{axis}={size}; "
                f"up to {mesh.size} devices, mesh.{mesh_axis} can be {', '.join(map(str, valid))}"
            )


def partition_spec(axes: Axes, shape: Sequence[int], mesh_shape: dict[str, int]) -> PartitionSpec:
    """Lays an array's logical `axes` over the mesh.

    A mesh axis that was claimed by an earlier dimension, or by which the dimension does not divide (the scale of shape
    (1, F), a batch of one), is left out: that dimension is then replicated over it. It is `check_mesh` that keeps the
    weights of a model from being replicated by mistake.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{len(axes)} logical axes {axes} for an array of {len(shape)} dimensions {tuple(shape)}")
    used: set[str] = set()
    entries: list[tuple[str, ...] | None] = []
    for axis, size in zip(axes, shape, strict=True):
        if axis is not None and axis not in RULES:
            raise ValueError(f"unknown logical axis {axis!r} in {axes}; known: {', '.join(RULES)}")
        taken: list[str] = []
        for mesh_axis in RULES[axis] if axis is not None else ():
            split = math.prod(mesh_shape[a] for a in taken) * mesh_shape[mesh_axis]
            if mesh_axis not in used and mesh_shape[mesh_axis] > 1 and size % split == 0:
                taken.append(mesh_axis)
        used.update(taken)
        entries.append(tuple(taken) or None)
    return PartitionSpec(*entries)


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[Mesh]:
    """Makes `mesh` the one that `constrain` sees while functions are traced inside the context."""
    with jax.set_mesh(mesh):
        yield mesh


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """States how an activation is laid out, by its logical axes; the identity without a mesh of several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, dict(mesh.shape)))


def lay_out(x: Any, *axes: str | None) -> jax.Array:
    """An array of the host on the devices of the mesh in use, by its logical axes; without one, on the default device.

    Not for functions that are traced: there `constrain` says the same.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.device_put(x)
    return jax.device_put(x, array_sharding(mesh, axes, x.shape))


def count_pieces(axis: str) -> int:
    """Into how many the mesh in use cuts arrays along a logical axis by which they divide; without one, 1."""
    sizes = jax.sharding.get_mesh().shape
    return math.prod(sizes.get(name, 1) for name in RULES[axis])


def array_sharding(mesh: Mesh, axes: Axes, shape: Sequence[int]) -> NamedSharding:
    """The sharding of one array with the given logical axes."""
    return NamedSharding(mesh, partition_spec(axes, shape, dict(mesh.shape)))


def tree_shardings(tree: T, mesh: Mesh) -> T:
    """`tree` with every array replaced by its sharding.

    An `nnx.Variable` (a parameter, or an optimizer moment made from one) lays each array of its value, packed ones
    included, by the axes it was declared with; an array outside of any variable (a step counter) is replicated.
    """

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        axes = leaf.get_metadata("out_sharding")
        return jax.tree.map(lambda array: array_sharding(mesh, axes, array.shape), leaf)

    return jax.tree.map(place, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
