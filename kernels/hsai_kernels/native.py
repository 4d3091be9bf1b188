"""The door to the C++ kernels: finds the library that the build left in this package and registers its XLA FFI targets.

The library is optional: hsai installs without a C++ compiler. It is no Python extension, only a shared object with C
symbols, so that one build serves every Python version; it does depend on the FFI version of the jaxlib it was built
against, which XLA checks when a target is registered.
"""

import ctypes
import functools
import importlib.util

import jax
import jax.numpy as jnp

from hsai_kernels.dispatch import BackendMissing

MAX_ROWS = 8
"""Rows of a native product with floating weights (kMaxRows in products.h)."""

MAX_INTEGER_ROWS = 1 << 16
"""Rows of a native product with integer weights (kMaxIntegerRows in products.h)."""

QUANTIZED_MATMUL = "hsai_quantized_matmul"
QUANTIZED_MATMUL_OF_LAYER = "hsai_quantized_matmul_of_layer"
SPARSE_MATMUL = "hsai_sparse_matmul"
SPARSE_MATMUL_OF_LAYER = "hsai_sparse_matmul_of_layer"
ALLOCATE = "hsai_allocate"
ATTENTION = "hsai_attention"
PAGED_ATTENTION = "hsai_paged_attention"

_TARGETS = {
    ALLOCATE: "HsaiAllocate",
    ATTENTION: "HsaiAttention",
    PAGED_ATTENTION: "HsaiPagedAttention",
    QUANTIZED_MATMUL: "HsaiQuantizedMatmul",
    QUANTIZED_MATMUL_OF_LAYER: "HsaiQuantizedMatmulOfLayer",
    SPARSE_MATMUL: "HsaiSparseMatmul",
    SPARSE_MATMUL_OF_LAYER: "HsaiSparseMatmulOfLayer",
}

NAMES = tuple(_TARGETS)
"""What the library's custom calls are called in a program."""

_REMEDY = (
    "low-bit and sparse products rebuild dense weights and are many times slower, and so is decoding over a cache; "
    "to mend it, put a C++17 compiler on the PATH and install hsai from its source folder again "
    "(pip install --no-deps -e .)"
)


def find_library() -> str | None:
    """Path of the native library, or None; import machinery finds it, so that editable installs work too."""
    spec = importlib.util.find_spec("hsai_kernels._native")
    return None if spec is None else spec.origin


@functools.cache
def load_library() -> ctypes.CDLL:
    """The native library, its targets registered with XLA. Raises BackendMissing if it is absent or unusable."""
    path = find_library()
    if path is None:
        raise BackendMissing(f"the native library hsai_kernels/_native.so was not built: {_REMEDY}")
    try:
        library = ctypes.CDLL(path)
        for target, symbol in _TARGETS.items():
            capsule = jax.ffi.pycapsule(getattr(library, symbol))
            jax.ffi.register_ffi_target(target, capsule, platform="cpu")
    except (OSError, AttributeError, jax.errors.JaxRuntimeError) as error:
        # Built for another machine, from other sources, or against a jaxlib whose FFI differs.
        raise BackendMissing(f"{path} cannot be used ({error}): {_REMEDY}") from error
    return library


def name_instruction_set() -> str:
    """The instruction set that the native kernels use, one of those that select.cc lists.

    "avx512" (with VNNI), "avxvnni", "avx2" or "baseline" (SSE2); on ARM "i8mm", "dotprod" or "baseline" (NEON).
    """
    describe = load_library().HsaiInstructionSet
    describe.restype = ctypes.c_char_p
    return describe().decode()


def use_instruction_set(name: str) -> None:
    """Makes the native kernels of this process use another instruction set, for tests and benchmarks.

    It takes effect with the next product, in compiled programs too.
    Raises ValueError for one that was not compiled or that this machine does not run.
    """
    if not load_library().HsaiUseInstructionSet(ctypes.c_char_p(name.encode())):
        raise ValueError(f"no native kernels for instruction set {name!r} on this machine")


def kernel_seconds() -> float:
    """For how long native kernels have run in this process; calls side by side count once."""
    count = load_library().HsaiKernelNanoseconds
    count.restype = ctypes.c_int64
    return 1e-9 * count()


def check_rows(rows: int, *, integer: bool) -> None:
    """Raises NotImplementedError unless native products take so many rows of integer, or of floating, weights."""
    if integer and not 1 <= rows <= MAX_INTEGER_ROWS:
        raise NotImplementedError(f"multiplies 1 to {MAX_INTEGER_ROWS} rows")
    if not integer and not 1 <= rows <= MAX_ROWS:
        raise NotImplementedError(
            f"multiplies 1 to {MAX_ROWS} rows of floating weights (more are better served by rebuilding the weight)"
        )


def call_product(
    target: str, layer: jax.Array | None, x: jax.Array, arrays: list[jax.Array], count: int, options: dict[str, int]
) -> tuple[jax.Array, ...]:
    """The products (..., F) of x (..., D) with weights of `count` arrays each, the first of which has F columns."""
    *lead, contraction = x.shape
    rows = x.reshape(-1, contraction)
    results = [jax.ShapeDtypeStruct((rows.shape[0], values.shape[-1]), x.dtype) for values in arrays[::count]]
    call = jax.ffi.ffi_call(target, results, vmap_method="sequential")
    found = call(*([] if layer is None else [layer.astype(jnp.int32)]), rows, *arrays, **options)
    return tuple(result.reshape(*lead, -1) for result in found)
