"""Compiling for GPUs that are not there: jax's CUDA plugin, which has XLA's compiler, and NVIDIA's assembler.

gpu_targets/ holds what XLA has to know of a chip, in the fields of its GpuTargetConfigProto.
"""

import pathlib
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.experimental import topologies

from hsai_kernels.aot.case import Target
from hsai_kernels.aot.gpu_cases import LISTS

FOLDER = pathlib.Path(__file__).parent / "gpu_targets"


def find_device(chip: str) -> jax.Device:
    """A device to compile for, which is not there. Raises NotImplementedError where the CUDA plugin is not found."""
    config = (FOLDER / f"{chip}.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", topology_name="", topology="1x1x1", target_config=config)
    return topology.devices[0]


def _describe(device: jax.Device) -> AbstractContextManager[Any]:
    """A mesh of this one device: where jax 0.12 looks for the chip that it lowers Triton for (0.10 does not look)."""
    described = jax.sharding.AbstractDevice(device_kind=device.device_kind, num_cores=None, platform="gpu")
    axes = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("device",), axis_types=axes, abstract_device=described)
    return jax.sharding.use_abstract_mesh(mesh)


TARGET = Target(
    platform="gpu",
    chips=tuple(sorted(path.stem for path in FOLDER.glob("*.txtpb"))),
    find_device=find_device,
    describe=_describe,
    lists=LISTS,
    # Without a GPU nothing can be timed: 0 takes XLA's own choices.
    options={"xla_gpu_autotune_level": 0},
    strict_options={"xla_gpu_fail_ptx_compilation_on_register_spilling": True},
    environment={
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "XLA_FLAGS": "",  # what compiles is told of XLA as it is, whoever asks
    },
)
