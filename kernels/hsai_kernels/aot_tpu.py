"""Compiles the TPU kernels for chips that are not there, with the real XLA:TPU and Mosaic, and tells what came of it.

Needs libtpu, which scripts/install_aot.sh puts into a folder of its own: in the virtual environment it would change how
jax starts for every program. So a process of its own compiles, which has that folder on its path; several such
processes may run at once.

    PYTHONPATH=.aot/tpu python -m hsai_kernels.aot_tpu --chips v5e v6e        one row of JSON a line

A row says, for kernel, case, dtype, chip and tile, whether it "compiles" or is "refused", with the compiler's reason
(no room in fast memory, an operation that Mosaic lacks). It says nothing of time or numbers.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from hsai_kernels.aot_tpu_cases import KERNELS, Case, list_cases
from hsai_kernels.dispatch import compile_for

TOPOLOGIES: Mapping[str, str] = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
"""The smallest of each generation; programs are for one of its chips."""
CHIPS = tuple(TOPOLOGIES)
ENVIRONMENT: Mapping[str, str] = {
    "JAX_PLATFORMS": "cpu",
    # No metadata server to ask, and no lock: nothing here touches a chip.
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
Row = dict[str, Any]


def compile_kernels(
    folder: str | os.PathLike[str],
    chips: Sequence[str] = CHIPS,
    kernels: Sequence[str] = KERNELS,
    *,
    quick: bool = False,
) -> list[Row]:
    """Compiles every case of `kernels` for `chips`, in a process of its own that has `folder` on its path.

    Returns rows of kernel, case, dtype, chip, tile, outcome ("compiles" or "refused"), reason (None where it compiles),
    temporary_bytes (None where refused) and seconds; the quick cases only, if `quick`.

    Raises RuntimeError with its last words if that process fails.
    """
    arguments = ["-m", "hsai_kernels.aot_tpu", "--chips", *chips, "--kernels", *kernels]
    return run_apart(folder, [*arguments, *(["--quick"] if quick else [])])


def run_apart(folder: str | os.PathLike[str], arguments: Sequence[str]) -> list[Row]:
    """The rows that another Python prints, which has the compiler in `folder` on its path; RuntimeError if it fails."""
    path = os.pathsep.join(filter(None, [os.path.abspath(folder), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed: {done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def find_device(chip: str) -> jax.Device:
    """A device to compile for, which is not there. Raises an error of jax's where libtpu is not found."""
    device: jax.Device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]
    return device


def compile_case(case: Case, chip: str, device: jax.Device) -> Row:
    """One row: see `compile_kernels`. What is refused before the compiler sees it, by Pallas or hsai, is an error."""
    # The mesh tells Pallas for which chip it lowers.
    mesh = jax.sharding.Mesh(np.array([device]), ("chip",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    operands = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in case.operands]
    row: Row = {"kernel": case.kernel, "case": case.name, "dtype": case.dtype, "chip": chip, "tile": case.tile}
    start = time.monotonic()
    outcome, reason, temporary = "compiles", None, None
    with compile_for("tpu"), jax.set_mesh(mesh):
        lowered = jax.jit(case.function).lower(*operands)
        if "tpu_custom_call" not in lowered.as_text():
            raise RuntimeError(f"{row} is a program without a kernel")
        try:
            temporary = _count_temporary_bytes(lowered.compile())
        except jax.errors.JaxRuntimeError as error:
            outcome, reason = "refused", " ".join(str(error).split())[:300]
    seconds = round(time.monotonic() - start, 2)
    return row | {"outcome": outcome, "reason": reason, "temporary_bytes": temporary, "seconds": seconds}


def _count_temporary_bytes(compiled: jax.stages.Compiled) -> int:
    analysis: Any = compiled.memory_analysis()
    return int(analysis.temp_size_in_bytes)


def _compile_all(chips: Sequence[str], kernels: Sequence[str], quick: bool) -> Iterator[Row]:
    for chip in chips:
        device = find_device(chip)
        for kernel in kernels:
            for case in list_cases(kernel, quick=quick):
                yield compile_case(case, chip, device)


def _main() -> None:
    parser = argparse.ArgumentParser(description="Compiles TPU kernels for chips that are not there: JSON rows.")
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=CHIPS)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--quick", action="store_true", help="the small cases only")
    arguments = parser.parse_args()
    for row in _compile_all(arguments.chips, arguments.kernels, arguments.quick):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    _main()
