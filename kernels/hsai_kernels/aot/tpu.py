"""Compiling for TPUs that are not there: libtpu, which has XLA:TPU and Mosaic. Several processes may do so at once."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from hsai_kernels.aot.case import Target
from hsai_kernels.aot.tpu_cases import LISTS

TOPOLOGIES: Mapping[str, str] = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
"""The smallest of each generation; programs are for one of its chips."""


def find_device(chip: str) -> jax.Device:
    """A device to compile for, which is not there. Raises an error of jax's where libtpu is not found."""
    device: jax.Device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]
    return device


def _describe(device: jax.Device) -> AbstractContextManager[Any]:
    """A mesh of this one device tells Pallas for which chip it lowers."""
    return jax.set_mesh(jax.sharding.Mesh(np.array([device]), ("chip",)))


TARGET = Target(
    platform="tpu",
    chips=tuple(TOPOLOGIES),
    find_device=find_device,
    describe=_describe,
    lists=LISTS,
    environment={
        "JAX_PLATFORMS": "cpu",
        # No metadata server to ask, and no lock: nothing here touches a chip.
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_MIN_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "XLA_FLAGS": "",  # what compiles is told of XLA as it is, whoever asks
    },
)
