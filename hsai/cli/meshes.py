"""--mesh, of commands that spread one model over the devices of this machine."""

import re

from jax.sharding import Mesh

from hsai.errors import InputError
from hsai.sharding import MeshConfig, make_mesh


def read_mesh(text: str) -> Mesh:
    """The mesh that the option names; `InputError` if it names none, or one that this machine has not."""
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if found is None:
        raise InputError(f"--mesh {text} is no mesh; say DATAxFSDPxMODEL, such as 4x1x2")
    data, fsdp, model = map(int, found.groups())
    return make_mesh(MeshConfig(data=data, fsdp=fsdp, model=model))
