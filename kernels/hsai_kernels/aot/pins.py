"""The compilers of accelerators that are not here: packages, each of one version, that belong to the jax that is.

python kernels/hsai_kernels/aot/pins.py tpu        # or gpu: what scripts/install_aot.sh gives to pip
"""

import importlib.metadata
import sys
from fnmatch import fnmatchcase

LIBTPU = "0.0.42.1"
"""The libtpu (XLA:TPU and Mosaic) that jax was released with, of which jax itself names a pattern."""
NVCC = "12.9.86"


def list_pins(platform: str) -> list[str]:
    """Requirements for pip: without the libraries that run programs, which compiling does not need.

    Where jax has moved on from LIBTPU, what it asks for itself: no table is of that (`describe_compiler`).
    """
    if platform == "gpu":
        version = importlib.metadata.version("jaxlib")
        # XLA's CUDA compiler, about 600 MB, and NVIDIA's assembler.
        return [f"jax-cuda12-plugin=={version}", f"jax-cuda12-pjrt=={version}", f"nvidia-cuda-nvcc-cu12=={NVCC}"]
    wanted = next(line for line in importlib.metadata.requires("jax") or () if line.startswith("libtpu"))
    wanted = wanted.split(";")[0].strip()
    own = f"libtpu=={LIBTPU}"
    return [own if fnmatchcase(own, wanted) else wanted]


def describe_compiler(platform: str) -> str:
    """What the stored rows of a platform are to be compiled by."""
    return f"jax {importlib.metadata.version('jax')}, {', '.join(list_pins(platform))}"


if __name__ == "__main__":
    print(*list_pins(sys.argv[1]), sep="\n")
