"""Compiles a platform's cases, in a process of its own, and makes a row of each.

A row says, for kernel, case, dtype, chip and tile, whether it "compiles", "spills" (a GPU's: compiles, but keeps
registers in memory: slow, a tile to change), or is "refused", with the compiler's reason (no room in fast memory, an
operation that it lacks). It says nothing of time or numbers.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from hsai_kernels.aot import gpu, tpu
from hsai_kernels.aot.case import Case, Row, Target
from hsai_kernels.capabilities import identify, read_capabilities
from hsai_kernels.dispatch import compile_for
from hsai_kernels.tuning import Use, record_tiles, use_tiles

TARGETS: Mapping[str, Target] = {target.platform: target for target in (gpu.TARGET, tpu.TARGET)}
CUSTOM_CALLS = ("tpu_custom_call", "__gpu$xla.gpu.triton")
"""What a kernel is in a lowered program."""


def compile_kernels(
    platform: str,
    folder: str | os.PathLike[str],
    chips: Sequence[str] | None = None,
    kernels: Sequence[str] | None = None,
    *,
    quick: bool = False,
    missing: bool = False,
) -> list[Row]:
    """Compiles the cases of `kernels` (all, or the quick ones) for `chips`, by the compiler in `folder`; None is all.

    With `missing` only those that the stored table has no row of. Raises RuntimeError with the last words of the
    process that compiles, if it fails.
    """
    target = TARGETS[platform]
    arguments = ["-m", "hsai_kernels.aot", platform, "--chips", *(target.chips if chips is None else chips)]
    arguments += ["--kernels", *(target.kernels if kernels is None else kernels)]
    flags = [name for name, given in (("--quick", quick), ("--missing", missing)) if given]
    return run_apart(target, folder, [*arguments, *flags])


def run_apart(target: Target, folder: str | os.PathLike[str], arguments: Sequence[str]) -> list[Row]:
    """The rows that another Python prints, which has the compiler in `folder` on its path; RuntimeError if it fails."""
    path = os.pathsep.join(filter(None, [os.path.abspath(folder), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, **target.environment, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed: {done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def compile_cases(
    target: Target, chips: Sequence[str], kernels: Sequence[str], *, quick: bool, missing: bool
) -> Iterator[Row]:
    """In the process that has the compiler: a row for each case and chip, or for those without a stored one."""
    stored = {identify(row) for row in read_capabilities(target.platform)} if missing else set()
    for chip in chips:
        device = target.find_device(chip)
        for case in target.list_cases(kernels, quick=quick):
            if (case.kernel, case.name, case.dtype, chip) not in stored:
                yield compile_case(target, case, chip, device)


def compile_case(target: Target, case: Case, chip: str, device: jax.Device) -> Row:
    """One row. What is refused before the compiler sees it, by Pallas or by the kernel itself, is an error."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    operands = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), case.operands)
    start = time.monotonic()
    outcome, reason = "compiles", None
    compiled: jax.stages.Compiled | None = None
    # No chip is named to compile_for: what the table refuses is to be compiled again, and tiles are the kernels' own.
    with compile_for(target.platform), target.describe(device):
        with use_tiles(case.tiles), record_tiles() as used:
            lowered = jax.jit(case.function).lower(*operands)
        if not any(name in lowered.as_text() for name in CUSTOM_CALLS):
            raise RuntimeError(f"{case.kernel}, {case.name}, {case.dtype} is a program without a kernel")
        options: dict[str, Any] = dict(target.options)
        try:
            compiled = lowered.compile(compiler_options=options | dict(target.strict_options))
        except jax.errors.JaxRuntimeError as error:
            outcome, reason = "refused", " ".join(str(error).splitlines()[0].split())[:300]
        if reason is not None and "register spilling" in reason:
            outcome, compiled = "spills", lowered.compile(compiler_options=options)
    return {
        "kernel": case.kernel,
        "case": case.name,
        "dtype": case.dtype,
        "chip": chip,
        **describe_tile(case, used),
        "outcome": outcome,
        "reason": reason,
        "temporary_bytes": None if compiled is None else _count_temporary_bytes(compiled),
        "seconds": round(time.monotonic() - start, 2),
    }


def describe_tile(case: Case, used: Sequence[Use]) -> Row:
    """Shape class and tile that the case's kernel asked for while it was traced; None each for several kernels."""
    for use in used:
        if use.kernel == case.kernel:
            return {"shape": use.shape, "tile": dict(use.tile)}
    return {"shape": None, "tile": None}


def _count_temporary_bytes(compiled: jax.stages.Compiled) -> int:
    analysis: Any = compiled.memory_analysis()
    return int(analysis.temp_size_in_bytes)
