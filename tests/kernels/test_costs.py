"""Every Pallas kernel says what it costs: of what is inside, XLA's analysis of a program sees nothing else."""

import ast
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

import hsai_kernels
from hsai_kernels.aot.case import Case
from hsai_kernels.aot.runner import TARGETS
from hsai_kernels.dispatch import compile_for

ROOT = Path(hsai_kernels.__file__).parent
CASES = {
    (platform, case.kernel): case
    for platform, target in TARGETS.items()
    for case in target.list_cases(target.kernels, quick=False)
}
"""The last, and so a large, case of every kernel."""


def find_calls(jaxpr: Any) -> Iterator[Any]:
    """All kernels in a program, those in functions that it calls too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
            continue
        for inner in jax.tree.leaves(
            equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")
        ):
            if hasattr(inner, "jaxpr"):
                yield from find_calls(inner.jaxpr)
            elif hasattr(inner, "eqns"):
                yield from find_calls(inner)


def test_no_call_is_without_an_estimate() -> None:
    calls = {
        (path.relative_to(ROOT), node.lineno): {keyword.arg for keyword in node.keywords}
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "pallas_call"
    }
    assert len(calls) >= 11
    assert [at for at, given in calls.items() if "cost_estimate" not in given] == []


@pytest.mark.parametrize(("platform", "kernel"), list(CASES), ids=str)
def test_estimates_are_of_the_work_there_is(platform: str, kernel: str) -> None:
    case: Case = CASES[platform, kernel]
    with compile_for(platform):
        calls = list(find_calls(jax.make_jaxpr(case.function)(*case.operands).jaxpr))
    assert calls
    for call in calls:
        cost = call.params["cost_estimate"]
        # At least what is read and written once, and no more than each block of one side reading all of the other.
        arrays = [v.aval for v in (*call.invars, *call.outvars)]
        once = sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)
        assert 0.5 * once <= cost.bytes_accessed <= 1000 * once, call.params["name_and_src_info"]
        assert cost.flops > 0
        assert cost.transcendentals >= 0
        if "matmul" in kernel:
            x, weight = case.operands[0], case.operands[1:]
            columns = weight[-1].shape[-1]
            dense = 2 * math.prod(x.shape) * columns
            # With what fills up blocks: of a TPU, to 16 rows where decoding has one, and to whole groups of planes.
            assert dense <= cost.flops <= 1.7 * dense * max(1, 16 / math.prod(x.shape[:-1]))
