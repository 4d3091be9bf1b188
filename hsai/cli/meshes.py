"""--mesh, of commands that spread one model over the devices of this machine."""

import re

import jax
from jax.sharding import Mesh

from hsai.errors import InputError
from hsai.sharding import MeshConfig, make_mesh


def read_mesh(text: str) -> Mesh:
    """The mesh that the option names; `InputError` if it names none, or one that this machine has not."""
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if found is None:
        raise InputError(f"--mesh {text} is no mesh; say DATAxFSDPxMODEL, such as 4x1x2")
    data, fsdp, model = map(int, found.groups())
    config = MeshConfig(data=data, fsdp=fsdp, model=model)
    try:
        config.shape(jax.device_count())
    except InputError as error:
        more = f"; JAX_NUM_CPU_DEVICES={data * fsdp * model} in front of the command makes as many of a CPU"
        raise InputError(f"--mesh {text}: {error}{more if jax.default_backend() == 'cpu' else ''}") from error
    return make_mesh(config)
