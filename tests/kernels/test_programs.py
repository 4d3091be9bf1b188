"""The programs that the accelerators' compilers are given, only traced: no compiler is needed, and all are looked at.

What the compilers say of them is stored, and test_aot.py compiles some again.
"""

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from hsai_kernels.aot.runner import TARGETS, describe_tile
from hsai_kernels.block_product import multiply
from hsai_kernels.capabilities import identify, read_capabilities
from hsai_kernels.dispatch import compile_for
from hsai_kernels.tuning import record_tiles, use_tiles
from tests.kernels.programs import find_equations

HIGHEST = (jax.lax.Precision.HIGHEST,) * 2


def find_products(program: Any) -> Iterator[Any]:
    """The products inside of a program's kernels."""
    for call in find_equations(program.jaxpr, "pallas_call"):
        yield from find_equations(call.params["jaxpr"], "dot_general")


def find_rounded(program: Any) -> list[str]:
    """Those that may round float32 operands, to bfloat16 (TPU) or TF32 (GPU): an interpreter never does."""
    return [
        str(product)
        for product in find_products(program)
        if any(v.aval.dtype == jnp.float32 for v in product.invars) and product.params["precision"] != HIGHEST
    ]


APIS = [(name, api) for name, target in TARGETS.items() for api in target.lists]


@pytest.mark.parametrize(("platform", "api"), APIS)
def test_tiles_are_as_stored(platform: str, api: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no case is without a row, or a row without its case."""

    def call_nothing(kernel: Any, *, out_shape: Any, **options: Any) -> Any:
        """Tiles are chosen before; to trace hundreds of kernels takes a minute."""
        return lambda *operands: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out_shape)

    monkeypatch.setattr(pl, "pallas_call", call_nothing)
    target, found = TARGETS[platform], {}
    for case in target.list_cases([api], quick=False):
        with compile_for(platform), use_tiles(case.tiles), record_tiles() as used:
            # By a function of its own: what jax has traced before would record nothing.
            jax.eval_shape(functools.partial(case.function), *case.operands)
        tile = describe_tile(case, used)
        found |= {(case.kernel, case.name, case.dtype, chip): tile for chip in target.chips}
    stored = {
        identify(row): {"shape": row["shape"], "tile": row["tile"]}
        for row in read_capabilities(platform)
        if row["kernel"].split()[0] == api
    }
    assert found == stored, f"run scripts/write_capabilities.py {platform} {api}, or with --missing"


@pytest.mark.parametrize(("platform", "api"), APIS)
def test_no_kernel_rounds_float32(platform: str, api: str) -> None:
    """Of every kernel the first case with float32 activations, which is small or ragged; and one over a cache."""
    seen = set()
    for case in TARGETS[platform].list_cases([api], quick=False):
        kind = (case.kernel, case.name.endswith(" cache"))
        if case.dtype != "float32" or kind in seen:
            continue
        seen.add(kind)
        # With "default", whoever says nothing of precision is seen, also where a setting would say it for them.
        with compile_for(platform), jax.default_matmul_precision("default"):
            program = jax.make_jaxpr(functools.partial(case.function))(*case.operands)
        assert list(find_products(program)), f"{case.kernel}, {case.name}: no products"
        assert find_rounded(program) == [], f"{case.kernel}, {case.name}"
    assert seen


@pytest.mark.parametrize(
    ("dtype", "says", "rounded"), [("float32", False, 1), ("float32", True, 0), ("bfloat16", False, 0)]
)
def test_a_product_that_says_nothing_of_precision_is_found(dtype: str, says: bool, rounded: int) -> None:
    """In a branch of a kernel, in a function."""

    def kernel(x: Any, out: Any) -> None:
        @pl.when(pl.program_id(0) == 0)
        def _() -> None:
            out[...] = multiply(x[...], x[...]) if says else jnp.dot(x[...], x[...]).astype(jnp.float32)

    call = pl.pallas_call(kernel, grid=(1,), out_shape=jax.ShapeDtypeStruct((128, 128), jnp.float32))
    with jax.default_matmul_precision("default"):
        program = jax.make_jaxpr(jax.jit(call))(jnp.ones((128, 128), dtype))
    assert len(list(find_products(program))) == 1
    assert len(find_rounded(program)) == rounded


@pytest.mark.parametrize(("platform", "precision"), [("cpu", "None"), ("tpu", "highest")])
def test_on_an_accelerator_what_kernels_are_compared_with_is_exact(platform: str, precision: str) -> None:
    script = "import tests.conftest, jax; print(jax.config.jax_default_matmul_precision)"
    environment = {name: value for name, value in os.environ.items() if name != "JAX_DEFAULT_MATMUL_PRECISION"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).resolve().parents[2],
        env=environment | {"HSAI_TEST_PLATFORM": platform},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == precision
