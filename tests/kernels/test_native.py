"""The native library: every instruction set against the oracle, and the same bits every time."""

import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai_kernels import native, quantized_matmul, sparse_matmul
from tests.kernels import native_build, oracles
from tests.kernels.tolerances import assert_close

PROCESSOR_FLAGS = Path("/proc/cpuinfo")
REQUIRED_FLAGS = {
    "avx2": {"avx2", "fma"},
    "avxvnni": {"avx2", "fma", "avx_vnni"},
    "avx512": {"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"},
    "dotprod": {"asimddp"},
    "i8mm": {"asimddp", "i8mm"},
}
"""What select.cc asks for, as Linux names it; the baseline asks for nothing."""


def test_instruction_sets_that_this_machine_lacks_are_refused():
    known = native_build.INSTRUCTION_SETS.get(native_build.PROCESSOR, ("baseline",))
    runnable = native_build.list_runnable()
    assert "baseline" in runnable and native.name_instruction_set() == runnable[-1]
    for name in {*known, "sse9"} - set(runnable):
        with pytest.raises(ValueError, match=name):
            native.use_instruction_set(name)


@pytest.mark.skipif(not PROCESSOR_FLAGS.exists(), reason="this system does not say what its processor runs")
def test_the_library_has_every_instruction_set_of_this_machine():
    """The system says which there are, not the library: one that the build left out is missed."""
    lines = PROCESSOR_FLAGS.read_text().splitlines()
    flags = set(next(line for line in lines if line.startswith(("flags", "Features"))).split())
    known = native_build.INSTRUCTION_SETS.get(native_build.PROCESSOR, ("baseline",))
    wanted = [name for name in known if REQUIRED_FLAGS.get(name, set()) <= flags]
    assert native_build.list_runnable() == wanted


def _draw(rows, contraction, columns):
    """float64 x, codes -8..7, positions of 2:4, scales of groups of 32."""
    rng = np.random.default_rng(columns)
    x = rng.standard_normal((rows, contraction)).astype(np.float32)
    codes = rng.integers(-8, 8, (contraction, columns))
    positions = oracles.draw_positions(rng, contraction, columns, 2)
    scale = rng.uniform(0.01, 0.1, (contraction // 32, columns)).astype(np.float32)
    return x, codes, positions, scale


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        *zip((1, 2, 3, 8, 17) * 3, (1, 3, 4, 7, 8, 15, 16, 17, 64, 100, 257), strict=False),
        *itertools.product((1, 2, 3, 8, 17), (33, 4133)),
    ],
)
def test_every_instruction_set_matches_the_oracle(instruction_set, rows, columns):
    x, codes, positions, scale = _draw(rows, 64, columns)
    exact = x.astype(np.float64)
    dense = oracles.scale_rows(codes, scale)
    largest = np.abs(exact) @ oracles.scale_rows(np.full(codes.shape, 15), scale)
    words = oracles.pack(codes + 8, 4)
    out = quantized_matmul(x, words, scale, implementation="cpu")
    assert_close(out, exact @ dense, largest, "float32")
    halves = [part.astype(np.float16) for part in (scale, -3 * scale)]
    out = quantized_matmul(x, words, *halves, implementation="cpu")
    offset = oracles.scale_rows(codes + 8, halves[0]) + oracles.scale_rows(np.ones_like(codes), halves[1])
    assert_close(out, exact @ offset, 2 * largest, "float32")
    pairs = oracles.pack((codes & 3), 2)
    for centered, zero in ((False, 2), (True, 1.5)):
        out = quantized_matmul(x, pairs, scale, bits=2, centered=centered, implementation="cpu")
        assert_close(out, exact @ oracles.scale_rows((codes & 3) - zero, scale), largest, "float32")
    threes = oracles.pack(codes & 7, 3)
    for centered, zero in ((False, 4), (True, 3.5)):
        out = quantized_matmul(x, threes, scale, bits=3, centered=centered, implementation="cpu")
        assert_close(out, exact @ oracles.scale_rows((codes & 7) - zero, scale), largest, "float32")
    kept = codes[:32]
    indices = oracles.pack(positions, 2)
    large = np.where(codes % 2, 16 * codes + 15, 16 * codes)
    out = quantized_matmul(x, large.astype(np.int8), scale, implementation="cpu")
    assert_close(out, exact @ oracles.scale_rows(large, scale), 17 * largest, "float32")
    sparse = oracles.densify(oracles.scale_rows(kept, scale), positions, 2)
    out = sparse_matmul(x, oracles.pack(kept + 8, 4), indices, scale, n=2, m=4, implementation="cpu")
    assert_close(out, exact @ sparse, np.abs(exact) @ np.abs(sparse), "float32")
    sparse = oracles.densify(oracles.scale_rows(large[:32], scale), positions, 2)
    out = sparse_matmul(x, large[:32].astype(np.int8), indices, scale, n=2, m=4, implementation="cpu")
    assert_close(out, exact @ sparse, np.abs(exact) @ np.abs(sparse), "float32")
    if rows > native.MAX_ROWS:
        return
    plain = oracles.densify(kept, positions, 2)
    for dtype in (jnp.float32, jnp.bfloat16):
        out = sparse_matmul(x, jnp.asarray(kept, dtype), indices, n=2, m=4, implementation="cpu")
        assert_close(out, exact @ plain, np.abs(exact) @ np.abs(plain), "float32")


@pytest.mark.parametrize("columns", [1, 3, 8, 17, 100, 4133])
@pytest.mark.parametrize(("rows", "kept"), [(1, 4), (2, 2), (3, 1), (13, 4)])
def test_eighths_of_every_instruction_set_match_the_oracle(instruction_set, rows, kept, columns):
    rng = np.random.default_rng(columns)
    x = rng.standard_normal((rows, 256)).astype(np.float32)
    positions = oracles.draw_positions(rng, 256, columns, kept, 8)
    indices, exact = oracles.pack(positions, 3), x.astype(np.float64)
    scale = rng.uniform(0.01, 0.1, (4, columns)).astype(np.float32)
    for zero in (8, 128):
        codes = rng.integers(-zero, zero, positions.shape)
        values = oracles.pack(codes + 8, 4) if zero == 8 else codes.astype(np.int8)
        weight = oracles.densify(oracles.scale_rows(codes, scale), positions, kept, 8)
        out = sparse_matmul(x, values, indices, scale, n=kept, m=8, implementation="cpu")
        assert_close(out, exact @ weight, np.abs(exact) @ np.abs(weight), "float32")


def test_results_are_the_same_bits_every_time():
    """Also while several calls share the thread pool: how columns fall to threads must not matter."""
    x, codes, positions, scale = _draw(4, 512, 2085)
    words, indices = oracles.pack(codes + 8, 4), oracles.pack(positions, 2)

    def multiply(x):
        quantized = quantized_matmul(x, words, scale, implementation="cpu")
        return quantized, sparse_matmul(x, words[:32], indices, scale, n=2, m=4, implementation="cpu")

    first = jax.tree.map(np.asarray, jax.jit(multiply)(x))
    devices = jax.devices()
    running = [jax.jit(multiply)(jax.device_put(x, devices[i % len(devices)])) for i in range(40)]
    for out in running:
        jax.tree.map(np.testing.assert_array_equal, out, first)


COUNT_THREADS = """
import os, threading
import jax, jax.numpy as jnp
from hsai_kernels import attention, quantized_matmul

counts, done = [], threading.Event()

def count():
    while not done.is_set():
        counts.append(len(os.listdir("/proc/self/task")))

x, words, scale = jnp.ones((8, 2048)), jnp.zeros((256, 4096), jnp.uint32), jnp.ones((1, 4096))
q, cache, at = jnp.ones((1, 64, 8, 64)), jnp.ones((1, 2048, 8, 64)), jnp.arange(2048, dtype=jnp.int32)[None]
programs = [
    (jax.jit(lambda *operands: quantized_matmul(*operands, implementation="cpu")), (x, words, scale)),
    (
        jax.jit(lambda *o: attention(*o[:3], q_positions=o[3], kv_positions=o[4], implementation="cpu")),
        (q, cache, cache, at[:, -64:], at),
    ),
]
compiled = [(program.lower(*operands).compile(), operands) for program, operands in programs]
jax.jit(lambda x: x.T @ x)(x).block_until_ready()
counter = threading.Thread(target=count)
counter.start()
while not counts:
    pass
before = len(counts)
for _ in range(20):
    for program, operands in compiled:
        program(*operands).block_until_ready()
done.set()
counter.join()
print(counts[0], max(counts), len(counts) - before)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="this system does not list a process' threads")
def test_no_threads_are_started():
    """Also none that end with a call: work goes to those that XLA has, which a product of its own has started."""
    done = subprocess.run([sys.executable, "-c", COUNT_THREADS], capture_output=True, text=True, check=True)
    before, most, looks = map(int, done.stdout.split())
    assert 1 < most <= before and looks > 20


def test_rows_do_not_influence_each_other():
    x, codes, _, scale = _draw(4, 64, 100)
    words = oracles.pack(codes + 8, 4)
    together = quantized_matmul(x, words, scale, implementation="cpu")
    x[1:] = np.nan
    spoilt = quantized_matmul(x, words, scale, implementation="cpu")
    np.testing.assert_array_equal(spoilt[0], together[0])
    assert np.all(np.isnan(spoilt[1:]))


MULTIPLIES_BYTES = ("avx512", "avxvnni", "dotprod", "i8mm")
"""Instruction sets that multiply bytes: with others, many rows of floats stay floats."""


@pytest.mark.parametrize("activation_bits", [None, 8])
@pytest.mark.parametrize("kind", ["int4", "minima", "int3", "int2", "2:4", "4:8", "64:2:8", "2:4 int8"])
def test_a_rows_bits_do_not_depend_on_how_many_there_are(instruction_set, kind, activation_bits):
    """Few rows unpack a weight on the way, many have a panel: a text must not depend on who is read beside it."""
    if activation_bits is None and ":" not in kind and native.name_instruction_set() not in MULTIPLIES_BYTES:
        pytest.skip("many rows stay floats")
    rng = np.random.default_rng(7)
    contraction, columns = 256, 128
    x = rng.standard_normal((70, contraction)).astype(np.float32)
    scale = rng.uniform(0.01, 0.1, (contraction // 128, columns)).astype(np.float32)
    if ":" in kind:
        n, m = (int(part) for part in kind.removeprefix("64:").split()[0].split(":"))
        blocked = kind.startswith("64:")
        kept = contraction * n // m
        positions = oracles.draw_positions(
            rng, kept * 4 // n if blocked else contraction, columns, n, 4 if blocked else m
        )
        codes = rng.integers(-8, 8, positions.shape)
        values = codes.astype(np.int8) if kind.endswith("int8") else oracles.pack(codes + 8, 4)
        operands = [values, oracles.pack(positions, 3 if m == 8 and not blocked else 2), scale]
        if blocked:
            operands.append(oracles.pack_choices(oracles.draw_choices(rng, contraction, columns // 64, m), m))
        call = functools.partial(sparse_matmul, n=n, m=m, activation_bits=activation_bits, implementation="cpu")
    else:
        bits = {"int3": 3, "int2": 2}.get(kind, 4)
        words = oracles.pack(rng.integers(0, 2**bits, (contraction, columns)), bits)
        operands = [words, scale, -3 * scale] if kind == "minima" else [words, scale]
        options = {"bits": bits, "centered": bits < 4, "activation_bits": activation_bits}
        call = functools.partial(quantized_matmul, **options, implementation="cpu")
    operands = [jnp.asarray(operand) for operand in operands]
    alone = np.concatenate([call(x[row : row + 1], *operands) for row in range(9)])
    for rows in (2, 5, 8, 9, 16, 17, 70):
        np.testing.assert_array_equal(np.asarray(call(x[:rows], *operands))[:9], alone[:rows], err_msg=f"{rows} rows")


def _draw_magnitudes(name):
    """Activations (1, 64) that are hard to hold in integers."""
    x = np.random.default_rng(0).standard_normal((1, 64)).astype(np.float32)
    match name:
        case "tiny":
            return x * np.float32(1e-30)
        case "huge":
            return x * np.float32(1e36)
        case "spike":
            x[0, 17] = 1e6
            return x
        case "zero":
            return x * 0
        case "one":  # the largest of its block is as near to the next power of two as a float comes
            return np.full_like(x, np.nextafter(np.float32(1), np.float32(0)))
        case "below":  # numbers without a full mantissa
            return x * np.float32(1e-39)


@pytest.mark.parametrize("name", ["tiny", "huge", "spike", "zero", "one", "below"])
def test_magnitudes(instruction_set, name):
    x = _draw_magnitudes(name)
    _, codes, positions, scale = _draw(1, 64, 33)
    exact = x.astype(np.float64)
    out = quantized_matmul(x, oracles.pack(codes + 8, 4), scale, implementation="cpu")
    # Below 2^-126 there are fewer digits: what a block's step of at most 2^-126 rounds off.
    floor = 64 * 15 * 0.1 * 2.0**-127 / 2.0**-20
    magnitude = np.abs(exact) @ oracles.scale_rows(np.full(codes.shape, 15), scale) + floor
    assert_close(out, exact @ oracles.scale_rows(codes, scale), magnitude, "float32")
    out = quantized_matmul(x, codes.astype(np.int8), scale, implementation="cpu")
    assert_close(out, exact @ oracles.scale_rows(codes, scale), magnitude, "float32")
    kept = codes[:32]
    sparse = oracles.scale_rows(oracles.densify(kept, positions, 2), scale)
    args = (oracles.pack(kept + 8, 4), oracles.pack(positions, 2), scale)
    out = sparse_matmul(x, *args, n=2, m=4, implementation="cpu")
    assert_close(out, exact @ sparse, magnitude, "float32")


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_row_that_holds_no_number_gives_none(instruction_set, value):
    x, codes, positions, scale = _draw(2, 64, 33)
    x[1, 40] = value
    words = oracles.pack(codes + 8, 4)
    for values in (words, codes.astype(np.int8)):
        out = quantized_matmul(x, values, scale, implementation="cpu")
        assert np.all(np.isfinite(out[0])) and np.all(np.isnan(out[1]))
    out = sparse_matmul(x, words[:4], oracles.pack(positions, 2), scale, n=2, m=4, implementation="cpu")
    assert np.all(np.isfinite(out[0])) and np.all(np.isnan(out[1]))


@pytest.mark.parametrize("rows", [1, 2, 19])
def test_dynamic_int8_is_the_references(instruction_set, rows):
    """Both round the same way, and their integers are exact: only the sum over groups may differ."""
    x, codes, positions, scale = _draw(rows, 128, 100)
    magnitude = np.abs(x).astype(np.float64) @ oracles.scale_rows(np.full(codes.shape, 15), scale)
    for values, unit in (((16 * codes).astype(np.int8), 16), (oracles.pack(codes + 8, 4), 1)):
        operands = (x, values, scale)
        expected = quantized_matmul(*operands, activation_bits=8, implementation="reference")
        out = quantized_matmul(*operands, activation_bits=8, implementation="cpu")
        assert_close(out, np.asarray(expected, np.float64), unit * magnitude, "float32")
    operands = (x, operands[1][:8], oracles.pack(positions, 2), scale)
    expected = sparse_matmul(*operands, n=2, m=4, activation_bits=8, implementation="reference")
    out = sparse_matmul(*operands, n=2, m=4, activation_bits=8, implementation="cpu")
    assert_close(out, np.asarray(expected, np.float64), magnitude, "float32")
