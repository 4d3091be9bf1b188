"""Compiles the GPU kernels for chips that are not there, with XLA's own compiler, and tells what came of it as rows.

Needs the CUDA plugin of jax, which scripts/install_aot.sh puts into a folder of its own: beside jax in a virtual
environment it would be taken for a broken GPU by every program. So a process of its own compiles, which has that folder
on its path. gpu_targets/ holds what XLA has to know of a chip, in the fields of its GpuTargetConfigProto.

    PYTHONPATH=.aot/gpu python -m hsai_kernels.aot_gpu --chips a100 h100      one row of JSON a line

A row says, for kernel, case, dtype, chip and tile, whether it "compiles", "spills" (compiles, but keeps registers in
memory: slow, a tile to change), or is "refused", with the compiler's reason. It says nothing of time or numbers.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from hsai_kernels.aot_cases import KERNELS, Case, list_cases
from hsai_kernels.dispatch import compile_for

TARGETS = pathlib.Path(__file__).parent / "gpu_targets"
CHIPS = tuple(sorted(path.stem for path in TARGETS.glob("*.txtpb")))
Row = dict[str, Any]

# Without a GPU nothing can be timed: 0 takes XLA's own choices.
OPTIONS: dict[str, Any] = {"xla_gpu_autotune_level": 0}
FAIL_IF_SPILLING: dict[str, Any] = {"xla_gpu_fail_ptx_compilation_on_register_spilling": True}


def compile_kernels(
    folder: str | os.PathLike[str], chips: Sequence[str] = CHIPS, kernels: Sequence[str] = KERNELS
) -> list[Row]:
    """Compiles every case of `kernels` for `chips`, in a process of its own that has `folder` on its path.

    Returns rows of kernel, case, dtype, chip, tile, outcome ("compiles", "spills" or "refused"), reason (None where it
    compiles), temporary_bytes (None where refused) and seconds.

    Raises RuntimeError with its last words if that process fails.
    """
    path = os.pathsep.join(filter(None, [os.path.abspath(folder), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "hsai_kernels.aot_gpu", "--chips", *chips, "--kernels", *kernels]
    environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"compiling for {', '.join(chips)} failed: {done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def find_device(chip: str) -> jax.Device:
    """A device to compile for, which is not there. Raises NotImplementedError where the CUDA plugin is not found."""
    config = (TARGETS / f"{chip}.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", topology_name="", topology="1x1x1", target_config=config)
    return topology.devices[0]


def compile_case(case: Case, chip: str, device: jax.Device) -> Row:
    """One row: see `compile_kernels`."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    operands = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), case.operands)
    row: Row = {"kernel": case.kernel, "case": case.name, "dtype": case.dtype, "chip": chip, "tile": case.tile}
    start = time.monotonic()
    with compile_for("gpu"), jax.sharding.use_abstract_mesh(_describe_mesh(device)):
        lowered = jax.jit(case.function).lower(*operands)
    outcome, reason = "compiles", None
    compiled: Any = None
    try:
        compiled = lowered.compile(compiler_options=OPTIONS | FAIL_IF_SPILLING)
    except jax.errors.JaxRuntimeError as error:
        outcome, reason = "refused", str(error).splitlines()[0][:300]
    if reason is not None and "register spilling" in reason:
        outcome, compiled = "spills", lowered.compile(compiler_options=OPTIONS)
    temporary = None if compiled is None else compiled.memory_analysis().temp_size_in_bytes
    return row | {
        "outcome": outcome,
        "reason": reason,
        "temporary_bytes": temporary,
        "seconds": round(time.monotonic() - start, 2),
    }


def _describe_mesh(device: jax.Device) -> jax.sharding.AbstractMesh:
    """A mesh of this one device: where jax 0.12 looks for the chip that it lowers Triton for (0.10 does not look)."""
    described = jax.sharding.AbstractDevice(device_kind=device.device_kind, num_cores=None, platform="gpu")
    axes = (jax.sharding.AxisType.Auto,)
    return jax.sharding.AbstractMesh((1,), ("device",), axis_types=axes, abstract_device=described)


def _compile_all(chips: Sequence[str], kernels: Sequence[str]) -> Iterator[Row]:
    for chip in chips:
        device = find_device(chip)
        for kernel in kernels:
            for case in list_cases(kernel):
                yield compile_case(case, chip, device)


def _main() -> None:
    parser = argparse.ArgumentParser(description="Compiles GPU kernels for chips that are not there: JSON rows.")
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=CHIPS)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    arguments = parser.parse_args()
    for row in _compile_all(arguments.chips, arguments.kernels):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    _main()
