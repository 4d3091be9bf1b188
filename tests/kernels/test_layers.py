"""A layer of stacked weights: every backend gives what it gives for that layer alone, and wrong ones are refused."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai_kernels import native, quantized_matmul, sparse_matmul
from tests.kernels import oracles

LAYERS, CONTRACTION, COLUMNS, GROUP = 3, 64, 80, 32


def _stack(draw):
    """Operands of every layer, and stacked."""
    layers = [draw(np.random.default_rng(seed)) for seed in range(LAYERS)]
    return layers, [None if parts[0] is None else jnp.stack(parts) for parts in zip(*layers, strict=True)]


def _draw_scale(rng, dtype="float32"):
    """Powers of two: with integers for weights and activations, all sums are exact."""
    return jnp.asarray(2.0 ** rng.integers(-6, -3, (CONTRACTION // GROUP, COLUMNS)), dtype)


def _draw_codes(rng, bits, minimum=False):
    codes = rng.integers(0, 2**bits, (CONTRACTION, COLUMNS))
    scale = _draw_scale(rng, "float16" if minimum else "bfloat16")
    return jnp.asarray(oracles.pack(codes, bits)), scale, -3 * scale if minimum else None


def _draw_int8(rng):
    return jnp.asarray(rng.integers(-127, 128, (CONTRACTION, COLUMNS)), jnp.int8), _draw_scale(rng), None


def _draw_sparse(rng, kind, width=0):
    m = 8 if width else 4
    positions = oracles.draw_positions(rng, CONTRACTION * 4 // m, COLUMNS, 2, 4)
    choices = None
    if width:
        choices = oracles.pack_choices(oracles.draw_choices(rng, CONTRACTION, COLUMNS // width, m), m)
    indices = jnp.asarray(oracles.pack(positions, 2))
    if kind == "float32":
        return jnp.asarray(rng.integers(-8, 8, positions.shape), kind), indices, None, choices
    codes = rng.integers(-8, 8, positions.shape)
    values = oracles.pack(codes + 8, 4) if kind == "int4" else codes.astype(np.int8)
    return jnp.asarray(values), indices, _draw_scale(rng), choices


KINDS = {
    "int8": (quantized_matmul, _draw_int8, {}),
    "int4": (quantized_matmul, functools.partial(_draw_codes, bits=4), {}),
    "int4 with a minimum": (quantized_matmul, functools.partial(_draw_codes, bits=4, minimum=True), {}),
    "int3": (quantized_matmul, functools.partial(_draw_codes, bits=3), {"bits": 3, "centered": True}),
    "2:4": (sparse_matmul, functools.partial(_draw_sparse, kind="float32"), {"n": 2, "m": 4}),
    "2:4 int8": (sparse_matmul, functools.partial(_draw_sparse, kind="int8"), {"n": 2, "m": 4}),
    "2:4 int4": (sparse_matmul, functools.partial(_draw_sparse, kind="int4"), {"n": 2, "m": 4, "activation_bits": 8}),
    "16:2:8 int4": (sparse_matmul, functools.partial(_draw_sparse, kind="int4", width=16), {"n": 2, "m": 8}),
}


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_gives_what_it_gives_alone(kind, implementation):
    product, draw, options = KINDS[kind]
    layers, stacked = _stack(draw)
    rng = np.random.default_rng(9)
    if implementation == "cpu":
        x = jnp.asarray(rng.standard_normal((2, CONTRACTION)), jnp.float32)
    else:
        # In another program XLA adds in another order. Rounding to int8 keeps integers whose largest is 127.
        x = jnp.asarray(rng.integers(-127, 128, (2, CONTRACTION)), jnp.float32).at[:, ::GROUP].set(127)
    multiply = functools.partial(product, **options, implementation=implementation)
    alone = [multiply(x, *layer) for layer in layers]

    @jax.jit
    def multiply_all(stacked):
        return jax.lax.map(lambda layer: multiply(x, *stacked, layer=layer), jnp.arange(LAYERS))

    np.testing.assert_array_equal(multiply_all(stacked), jnp.stack(alone))
    for one, other in itertools.combinations(alone, 2):
        assert not np.allclose(one, other)


@pytest.mark.parametrize("kind", ["int4 with a minimum", "2:4", "2:4 int8"])
def test_gradients_are_those_of_the_layer(kind):
    product, draw, options = KINDS[kind]
    layers, stacked = _stack(draw)
    x = jnp.asarray(np.random.default_rng(9).standard_normal((2, CONTRACTION)), jnp.float32)
    floating = [i for i, part in enumerate(stacked) if part is not None and jnp.issubdtype(part.dtype, jnp.floating)]

    def lose(changed, operands, **layer):
        given = [*operands]
        for i, part in zip(floating, changed[1:], strict=True):
            given[i] = part
        return jnp.sum(jnp.sin(product(changed[0], *given, **options, **layer)))

    wanted = jax.grad(lose)([x, *(layers[1][i] for i in floating)], layers[1])
    got = jax.grad(lose)([x, *(stacked[i] for i in floating)], stacked, layer=jnp.int32(1))
    np.testing.assert_array_equal(got[0], wanted[0])
    for stack, part in zip(got[1:], wanted[1:], strict=True):
        np.testing.assert_array_equal(stack[1], part)
        assert not np.any(stack[0]) and not np.any(stack[2])


def test_bad_layers_are_refused():
    _, (values, scale, _) = _stack(_draw_int8)
    x = jnp.ones((1, CONTRACTION))
    for layer in (jnp.float32(1), jnp.zeros(1, jnp.int32)):
        with pytest.raises(ValueError, match=rf"one integer, not {layer.dtype}"):
            quantized_matmul(x, values, scale, layer=layer)
    with pytest.raises(ValueError, match=r"\(3, 64, 80\), \(2, 2, 80\)"):
        quantized_matmul(x, values, scale[:2], layer=jnp.int32(0))
    with pytest.raises(ValueError, match="contracts over 63"):
        quantized_matmul(x[:, :-1], values, scale, layer=jnp.int32(0))
    _, (values, indices, scale, _) = _stack(functools.partial(_draw_sparse, kind="int8"))
    with pytest.raises(ValueError, match="as many layers"):
        sparse_matmul(x, values, indices[:1], scale, n=2, m=4, layer=jnp.int32(0))


VALUES, SCALES = np.zeros((3, 64, 16), np.int8), np.ones((3, 2, 16), np.float32)
MINIMA, INDICES, CHOICES = SCALES[:, :0], np.zeros((3, 2, 16), np.uint32), np.zeros((3, 0, 16), np.uint32)


def _call(target, layer, *operands, **attributes):
    native.load_library()
    call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((1, 16), jnp.float32))
    attributes = {name: np.int64(value) if name != "centered" else value for name, value in attributes.items()}
    return jax.block_until_ready(call(layer, np.ones((1, 64), np.float32), *operands, **attributes))


@pytest.mark.parametrize(
    ("layer", "values", "scale"),
    [
        (np.int32(3), VALUES, SCALES),  # beyond the last
        (np.int32(-1), VALUES, SCALES),
        (np.uint32(1), VALUES, SCALES),
        (np.zeros(1, np.int32), VALUES, SCALES),
        (np.int32(2), VALUES, SCALES[:2]),  # fewer layers of one array
        (np.int32(0), VALUES[0], SCALES),
        (np.int32(0), VALUES[None], SCALES[None]),
        (np.int32(0), VALUES[:0], SCALES[:0]),
        (np.int32(0), VALUES[:, :-2], SCALES),
    ],
)
def test_wrong_native_calls_give_an_error(layer, values, scale):
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT.*hsai_kernels"):
        _call(
            native.QUANTIZED_MATMUL_OF_LAYER,
            *(layer, values, scale, MINIMA),
            **{"bits": 8, "centered": False, "activation_bits": 0},
        )
    kept = values[..., ::2, :]
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT.*hsai_kernels"):
        _call(
            native.SPARSE_MATMUL_OF_LAYER,
            *(layer, kept, INDICES, scale, CHOICES),
            **{"n": 2, "m": 4, "activation_bits": 0},
        )


def test_right_native_calls_give_none():
    """What the wrong ones differ from by one thing."""
    _call(
        native.QUANTIZED_MATMUL_OF_LAYER,
        *(np.int32(2), VALUES, SCALES, MINIMA),
        **{"bits": 8, "centered": False, "activation_bits": 0},
    )
    _call(
        native.SPARSE_MATMUL_OF_LAYER,
        *(np.int32(2), VALUES[:, ::2], INDICES, SCALES, CHOICES),
        **{"n": 2, "m": 4, "activation_bits": 0},
    )
