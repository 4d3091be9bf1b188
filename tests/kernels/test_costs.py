"""Every Pallas kernel says what it costs: of what is inside, XLA's analysis of a program sees nothing else."""

import ast
import functools
import math
from pathlib import Path

import jax
import pytest

import hsai_kernels
from hsai_kernels.aot.case import Case
from hsai_kernels.aot.runner import TARGETS
from hsai_kernels.dispatch import compile_for
from hsai_kernels.tuning import record_tiles
from tests.kernels.programs import find_equations

ROOT = Path(hsai_kernels.__file__).parent


def _name_cache(case: Case) -> str:
    """Of attention over a cache of fewer bits than the queries have: who reads it."""
    if not case.name.endswith(" cache"):
        return ""
    return "token, narrow cache" if "decoding" in case.name else "prompt, narrow cache"


CASES = {
    (platform, case.kernel, _name_cache(case)): case
    for platform, target in TARGETS.items()
    for case in target.list_cases(target.kernels, quick=False)
    if "decoding" not in case.name or _name_cache(case)
}
"""The last, and so a large, case of every kernel; and of attention over a narrow cache one for a token and a prompt."""

ATTENTION_PRODUCTS = {
    "attention_forward": 2,  # scores, output
    "attention_backward_queries": 3,  # scores, gradients of weights and of queries
    "attention_d_rows": 3,
    "attention_backward_keys": 4,  # scores, gradients of weights, keys and values
    "attention_d_keys": 4,
}
LAYER_PRODUCTS = {"cross_entropy_forward": 1, "cross_entropy_backward": 3, "gated_mlp": 3, "norm_matmul": 1}
"""Matrix products of a kernel, by its name in the program: each is two operations a term."""

MOST_READS = {
    # A TPU's blocks of rows read all of the other side again: 2048 rows in blocks of 64 of a gated block, 128 of a
    # normalized product and of a loss; its gradient's blocks of columns read and write the rows' float32 sums again.
    "gated_mlp": 32,
    "norm_matmul": 16,
    "cross_entropy_forward": 16,
    "cross_entropy_backward": 25,
    "attention_forward": 5,
    "attention_backward_queries": 5,
    "attention_backward_keys": 5,
    "quantized_matmul": 3,
    "sparse_matmul": 3,
    # On a GPU what is read again comes from its cache: estimates count memory.
    "attention_d_rows": 1,
    "attention_d_keys": 1,
    "multiply_compressed": 1,
    "multiply_rounded": 1,
}
"""How many times the bytes of all operands and results a kernel moves at most, by its name."""


def test_no_call_is_without_an_estimate() -> None:
    calls = {
        (path.relative_to(ROOT), node.lineno): {keyword.arg for keyword in node.keywords}
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "pallas_call"
    }
    assert len(calls) >= 11
    assert [at for at, given in calls.items() if "cost_estimate" not in given] == []


def count_operations(name: str, case: Case) -> int:
    """Two for each term of each product, and what a normalization adds: from the shapes of the call alone."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(case.operands)]
    if name in ATTENTION_PRODUCTS:
        keys = next(shape for shape in reversed(shapes) if len(shape) == 4)[1]
        return 2 * ATTENTION_PRODUCTS[name] * math.prod(shapes[0]) * keys
    rows, contraction = math.prod(shapes[0][:-1]), shapes[0][-1]
    weight = shapes[2] if name == "norm_matmul" else shapes[1]
    normalization = 4 * rows * contraction if name == "norm_matmul" else 0
    return 2 * LAYER_PRODUCTS.get(name, 1) * rows * contraction * weight[-1] + normalization


def count_chosen(platform: str, case: Case, depth: int) -> tuple[float, float]:
    """Of a V:N:M product's operations, how many there are for each of a dense one; and those with what fills blocks of
    `depth` chosen positions, which a TPU has, for each of these."""
    x, *_, choices = (leaf.shape for leaf in jax.tree.leaves(case.operands))
    columns = jax.tree.leaves(case.operands)[1].shape[-1]
    m, width = int(case.kernel.split(":")[2].split()[0]), columns // choices[-1]
    if platform != "tpu":
        return 4 / m, 1
    # 128 columns are multiplied by what each of the blocks among them chose.
    starts = range(0, columns, 128)
    held = max(len({column // width for column in range(at, min(at + 128, columns))}) for at in starts)
    return held * 4 / m, math.ceil(x[-1] * 4 / m / depth) * depth / (x[-1] * 4 / m)


@pytest.mark.parametrize(("platform", "kernel", "cache"), list(CASES), ids=str)
def test_estimates_are_of_the_work_there_is(platform: str, kernel: str, cache: str) -> None:
    case: Case = CASES[platform, kernel, cache]
    with compile_for(platform), record_tiles() as used:
        # By a function of its own: what jax has traced before would record nothing.
        program = jax.make_jaxpr(functools.partial(case.function))(*case.operands)
    calls = list(find_equations(program.jaxpr, "pallas_call"))
    assert calls
    for call in calls:
        cost, name = call.params["cost_estimate"], call.params["name"]
        # Marks (positions, bounds of blocks) are int32, and a hundredth of the rest at most.
        arrays = [v.aval for v in (*call.invars, *call.outvars) if v.aval.dtype != "int32"]
        once = sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)
        assert 0.98 * once <= cost.bytes_accessed <= 1.02 * MOST_READS[name] * once, name
        rows = math.prod(jax.tree.leaves(case.operands)[0].shape[:-1])
        exact: float = count_operations(name, case)
        # A TPU's blocks have 16 rows at least: here of 3 rows, and of 4 heads of one query.
        fill = max(1, 16 / (4 if "token" in cache else rows)) if platform == "tpu" else 1
        if platform == "tpu" and "sparse" in kernel and jax.tree.leaves(case.operands)[0].shape[-1] == 1280:
            fill *= 2048 / 1280  # a contraction over 1280 takes two blocks of 1024
        if "V:" in kernel:
            share, filled = count_chosen(platform, case, used[0].tile.get("contraction", 1))
            exact, fill = exact * share, fill * filled
        assert 0.999 * exact <= cost.flops <= 1.03 * fill * exact, name
        assert cost.flops >= 0.999 * fill * exact
        assert 0 <= cost.transcendentals <= cost.flops
