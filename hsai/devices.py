"""Readies jax's devices for a run; must be called before anything asks jax for a device."""

import os

import jax

from hsai.errors import InputError
from hsai.sharding import MeshConfig

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def prepare_devices(config: MeshConfig) -> None:
    """Fakes CPU devices as `config` asks, and joins the other processes of the run if there are any.

    A run of several processes is announced by three environment variables, the same on each but for the last:
    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES, and JAX_PROCESS_ID.
    JAX_NUM_CPU_DEVICES, if it is set, wins over `config.cpu_devices`.
    """
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", config.cpu_devices)
    found = [name for name in _VARIABLES if os.environ.get(name)]
    if not found or jax.distributed.is_initialized():
        return
    if len(found) < len(_VARIABLES):
        missing = next(name for name in _VARIABLES if name not in found)
        raise InputError(f"{found[0]} is set and {missing} is not; a run of several processes needs both")
    address, count, index = (os.environ[name] for name in _VARIABLES)
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
        raise InputError(f"JAX_PROCESS_ID={index} must be a number below JAX_NUM_PROCESSES={count}")
    jax.distributed.initialize(coordinator_address=address, num_processes=int(count), process_id=int(index))
