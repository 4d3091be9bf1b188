"""Cases for native_driver.cc to run without Python, as a file of them, and what must come out.

Here: products (attention is in native_attention_cases.py).

Dimensions: R rows, D contraction, C stored elements a column, F columns. Shapes are small, for emulators, and ragged:
columns that fill no vector, every number of rows that a kernel is compiled for, and what lies between.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from tests.kernels import oracles
from tests.kernels.tolerances import assert_close

FORMATS = ("int8", "int4", "int3", "int2", "sparse_float32", "sparse_bfloat16", "sparse_int4", "sparse_int8")
"""In the order of Format in multiply.h."""

SCALE_TYPES = (None, "float32", "bfloat16", "float16")
"""In the order of ScaleType in products.h."""

COLUMNS = (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 100, 257)

CONTRACTION, GROUP = 128, 32
THREADS = 3

PRODUCT, ATTENTION = range(2)
"""What a case is, in the order of Kind in native_driver.cc."""

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}

# Float32 activations whose digits (kernels/csrc/planes.h) are as large as they come: signed
# (-126, -128, -128) and the opposite, biased (253, 255, 255) and (3, 0, 0).
EXTREMES = np.array([-0x7E8080, 0x7E8080, 0x7DFFFF, -0x7D0000], np.float32) / 2**23


@dataclass(frozen=True, kw_only=True)
class Case:
    """One product, or one attention: the driver's header and arrays, and the float64 result.

    Arrays are x, values, indices, scale, choices and minimum; of attention those that native_attention_cases.py names.
    """

    kind: int = PRODUCT
    name: str
    header: tuple[int, ...]
    arrays: tuple[np.ndarray, ...]
    dtype: str
    expected: np.ndarray
    magnitude: np.ndarray | float


def _round_activations(x: np.ndarray, groups: int) -> np.ndarray:
    """float64 (R, D) as the kernels round (R, D) to int8, in float32, so that no tie falls to another side."""
    split = x.astype(np.float32).reshape(len(x), groups, -1)
    step = np.abs(split).max(axis=-1, keepdims=True) / np.float32(127)
    return (np.rint(split / step) * step.astype(np.float64)).reshape(x.shape)


def make_case(
    kind: str,
    rows: int,
    columns: int,
    *,
    centered: bool = False,
    offset: bool = False,
    kept: int = 4,
    dtype: str = "float32",
    scale_type: str = "float32",
    group: int = GROUP,
    activation_bits: int | None = None,
    extreme: bool = False,
    pattern: int = 4,
    width: int = 0,
    contraction: int = CONTRACTION,
) -> Case:
    """A product of `rows` activations with a (D, `columns`) weight of one of FORMATS, drawn from its own arguments.

    `kept` of `pattern` for the sparse ones; `group` counts positions; `extreme` draws what makes integer sums largest.
    With `width` blocks of so many columns choose 4 of every `pattern` positions (V:N:M), and columns keep `kept` of 4.
    `centered` is for the dense ones in words, `offset` for int4, whose codes then count from minima.
    """
    m = 4 if width else pattern
    name = f"{kind} {kept}:{m}, {rows} rows, {columns} columns, {dtype}, scale {scale_type} of {group} in {contraction}"
    name += f", activations {activation_bits}, {extreme=}, {centered=}, {offset=}"
    name += f", {width}:{pattern}" if width else ""
    rng = np.random.default_rng(list(name.encode()))
    sparse, packed = kind.startswith("sparse"), kind in ("int4", "int3", "int2", "sparse_int4")
    integer = packed or kind.endswith("int8")
    stored, groups = contraction * kept // pattern, contraction // group
    x = rng.standard_normal((rows, contraction)).astype(np.float32)
    if extreme:
        x = np.repeat(EXTREMES[np.arange(rows) % len(EXTREMES)][:, None], contraction, axis=1)
    x = x.astype(DTYPES[dtype])
    exact = x.astype(np.float64)
    scale = oracles.draw_scale(rng, groups, columns).astype(DTYPES[scale_type])

    minimum = scale[:0]
    if integer:
        bits = {"int3": 3, "int2": 2}.get(kind, 8 if kind.endswith("int8") else 4)
        codes = rng.integers(0, 2**bits, (stored, columns))
        if extreme:  # every column as far from zero as codes go, on one side
            codes[:] = np.where(np.arange(columns) % 2, 2**bits - 1, 0)
        levels = codes - (0 if offset else oracles.find_zero(bits, centered))
        values = oracles.pack(codes, bits) if packed else levels.astype(np.int8)
        weight = oracles.scale_rows(levels, scale)
        # Codes may be summed before the code of zero is taken off, so that errors follow codes of up to 15.
        largest = oracles.scale_rows(np.full(codes.shape, 2**bits - 1), np.abs(scale))
        if offset:
            minimum = rng.uniform(-0.8, 0.2, scale.shape).astype(scale.dtype)
            weight += oracles.scale_rows(np.ones(codes.shape), minimum)
            largest += oracles.scale_rows(np.ones(codes.shape), np.abs(minimum))
    else:
        scale, scale_type_index = scale[:0], 0
        values = rng.standard_normal((stored, columns)).astype(DTYPES[kind.removeprefix("sparse_")])
        weight = largest = values.astype(np.float64)
    if integer:
        scale_type_index = SCALE_TYPES.index(scale_type)

    indices = np.zeros((0, columns), np.uint32)
    if sparse:
        positions = oracles.draw_positions(rng, contraction * m // pattern, columns, kept, m)
        indices = oracles.pack(positions, 2 if m == 4 else 3)
        weight = oracles.densify(weight, positions, kept, m)
        largest = oracles.densify(np.abs(largest), positions, kept, m)
    choices = np.zeros((0, columns), np.uint32)
    if width:
        chosen = oracles.draw_choices(rng, contraction, columns // width, pattern)
        choices = oracles.pack_choices(chosen, pattern)
        weight, largest = (oracles.spread(each, chosen, pattern) for each in (weight, largest))
    if activation_bits is not None:
        exact = _round_activations(x, groups)
    return Case(
        name=name,
        header=(
            FORMATS.index(kind),
            contraction,
            stored,
            stored // groups if scale_type_index else stored,
            int(2 * oracles.find_zero(bits, centered)) if packed and not sparse and not offset else 0,
            columns,
            pattern,
            width,
            scale_type_index,
            rows,
            dtype == "bfloat16",
            activation_bits == 8,
            THREADS,
        ),
        arrays=(x, values, indices, scale, choices, minimum),
        dtype=dtype,
        expected=exact @ weight,
        magnitude=np.abs(exact) @ np.abs(largest),
    )


def list_cases() -> Iterator[Case]:
    """Every format at every number of rows and columns (not each with each), types, groups, and the largest sums."""
    for kind in FORMATS:
        integer = kind not in ("sparse_float32", "sparse_bfloat16")
        for kept in (1, 2, 3) if kind.startswith("sparse") else (4,):
            for columns in COLUMNS:
                yield make_case(kind, 1 + columns % 3, columns, kept=kept)
            for rows in (*range(1, 10), 16, 21) if integer else range(1, 9):
                yield make_case(kind, rows, 37, kept=kept, dtype="bfloat16" if rows % 2 else "float32")
            # Enough for several tiles and threads.
            yield make_case(kind, 4, 1029, kept=kept, scale_type="bfloat16")
            if integer:
                for rows, dtype in ((1, "float32"), (2, "bfloat16"), (17, "float32")):
                    yield make_case(kind, rows, 37, kept=kept, dtype=dtype, activation_bits=8)
                for bits in (None, 8):
                    yield make_case(kind, 4, 20, kept=kept, activation_bits=bits, extreme=True)
                    yield make_case(kind, 2, 20, kept=kept, activation_bits=bits, group=CONTRACTION, extreme=True)
    for kind, columns in itertools.product(("int4", "int3", "int2"), COLUMNS):
        yield make_case(kind, 1 + columns % 3, columns, centered=True)
    for kind, bits, rows in itertools.product(("int4", "int3", "int2"), (None, 8), (1, 4, 17)):
        yield make_case(kind, rows, 20, centered=True, activation_bits=bits, extreme=rows > 1)
    for rows, dtype, bits in itertools.product((1, 2, 8, 19), ("float32", "bfloat16"), (None, 8)):
        options = {"dtype": dtype, "activation_bits": bits, "scale_type": "float16" if rows > 1 else "bfloat16"}
        yield make_case("int4", rows, 37, offset=True, **options)
        yield make_case("int4", rows, 20, offset=True, extreme=True, **options)
    yield from _list_many()
    # Groups, and so blocks, that end within a word of int8 weights; one is longer than a block, and prime.
    for contraction, group in ((3, 3), (74, 37), (66, 22), (101, 101)):
        for rows, dtype, bits in ((1, "float32", None), (9, "bfloat16", None), (3, "float32", 8)):
            yield make_case("int8", rows, 37, dtype=dtype, group=group, contraction=contraction, activation_bits=bits)
    for kept, pattern, width, columns in (
        (1, 8, 16, 48),
        (2, 8, 32, 64),
        (3, 8, 16, 16),
        (2, 16, 48, 96),
        (2, 8, 80, 80),
    ):
        for kind, (rows, dtype, bits) in itertools.product(
            ("sparse_int4", "sparse_int8"),
            ((1, "float32", None), (3, "bfloat16", None), (9, "float32", 8), (4, "float32", None)),
        ):
            yield make_case(
                kind,
                rows,
                columns,
                kept=kept,
                dtype=dtype,
                group=CONTRACTION,
                activation_bits=bits,
                extreme=rows == 4,
                pattern=pattern,
                width=width,
            )
    yield from _list_eighths()


def _list_many() -> Iterator[Case]:
    """Many rows: contractions of several panels (panels.h), columns of several tiles, and rows for more than one."""
    sparse = {"sparse_int4": {"kept": 2}, "sparse_int8": {"kept": 3, "group": 96}}
    for kind, options in {"int8": {}, "int4": {}, "int3": {}, "int2": {}, **sparse}.items():
        for rows, dtype, bits in ((18, "float32", 8), (21, "float32", None), (17, "bfloat16", None)):
            size = 1152 if kind in sparse else 672
            types = {"dtype": dtype, "activation_bits": bits, "contraction": size}
            yield make_case(kind, rows, 37, **options | types)
            yield make_case(kind, rows, 20, **options | types | {"group": size})
            yield make_case(kind, rows, 20, extreme=True, **options | types | {"group": size})
        yield make_case(kind, 19, 300, contraction=192, scale_type="float16", **options)
    for kind in ("int8", "int4", "sparse_int4"):
        yield make_case(kind, 515, 17, kept=2 if kind.startswith("sparse") else 4)
    yield make_case("int8", 9, 70, contraction=1075, group=1075)  # blocks of no whole words
    yield make_case("int4", 19, 70, contraction=672, offset=True, scale_type="float16")
    for bits in (None, 8):
        options = {"kept": 2, "pattern": 16, "width": 48, "contraction": 2560, "group": 128}
        yield make_case("sparse_int4", 10, 96, activation_bits=bits, **options)


def _list_eighths() -> Iterator[Case]:
    """N:8, with blocks of 8 to 64 kept elements, so that one starts at each of the four words of a unit."""
    for kind, kept in itertools.product(("sparse_int4", "sparse_int8"), (1, 2, 4)):
        # 1:8 needs 256 positions for whole words of indices.
        options = {"kept": kept, "pattern": 8, "contraction": 256, "group": 32 if kept > 1 else 64}
        for columns in COLUMNS:
            yield make_case(kind, 1 + columns % 3, columns, **options)
        for rows in (*range(1, 10), 21):
            yield make_case(kind, rows, 37, dtype="bfloat16" if rows % 2 else "float32", **options)
        yield make_case(kind, 4, 1029, scale_type="bfloat16", **options)
        for bits, group in itertools.product((None, 8), (64, 256)):
            yield make_case(kind, 3, 37, activation_bits=bits, **options | {"group": group})
            yield make_case(kind, 4, 20, activation_bits=bits, extreme=True, **options | {"group": group})


def write_cases(path: Path, cases: list[Case]) -> None:
    """As native_driver.cc reads them: for each its kind and a header, both of int64, then its arrays."""
    with path.open("wb") as file:
        for case in cases:
            sizes = (array.nbytes for array in case.arrays)
            file.write(np.array([case.kind, *case.header, *sizes], np.int64).tobytes())
            for array in case.arrays:
                file.write(array.tobytes())


def check_results(path: Path, cases: list[Case]) -> None:
    """Fails unless the file that the driver wrote holds every case's result, within tolerances.py."""
    content = path.read_bytes()
    at = 0
    for case in cases:
        out = np.frombuffer(content, DTYPES[case.dtype], case.expected.size, at).reshape(case.expected.shape)
        at += out.nbytes
        try:
            assert_close(out.astype(np.float64), case.expected, case.magnitude, case.dtype)
        except AssertionError as error:
            error.add_note(case.name)
            raise
    assert at == len(content), f"{len(content) - at} bytes more than the cases' results"
