"""cross_entropy: every backend against a float64 oracle over shapes, gradients too; memory; meshes; refusals."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai_kernels import cross_entropy, cross_entropy_sum
from hsai_kernels.ops.cross_entropy.chunked import BLOCK_TOKENS, BLOCK_VOCAB, cross_entropy_chunked
from hsai_kernels.ops.cross_entropy.reference import cross_entropy_reference
from hsai_kernels.ops.cross_entropy.shapes import HUGE, SHAPES, CrossEntropyShape
from tests.kernels import oracles
from tests.kernels.refusals import list_wrong_caps, list_wrong_counts
from tests.kernels.tolerances import assert_close

PORTABLE = {
    "reference": functools.partial(cross_entropy_reference, chunk=None),
    "chunked": functools.partial(cross_entropy_chunked, chunk=None),
    "small blocks": functools.partial(cross_entropy_chunked, chunk=4, block_vocab=48),
}
OPTIONS: tuple[dict[str, Any], ...] = ({}, {"softcap": 2.5}, {"z_loss": 0.01}, {"softcap": 4.0, "z_loss": 0.1})


def draw(shape: CrossEntropyShape, dtype: str, weight_dtype: str = "float32") -> tuple[jax.Array, ...]:
    """x, w, targets, and a gradient of the loss; logits of a deviation of 3, so that some words are likely."""
    rng = np.random.default_rng(shape.tokens * 1000 + shape.vocab)
    x = jnp.asarray(rng.standard_normal((*shape.lead, shape.tokens, shape.embed)), dtype)
    w = jnp.asarray(rng.standard_normal((shape.embed, shape.vocab)) * 3 * shape.embed**-0.5, weight_dtype)
    targets = jnp.asarray(rng.integers(0, shape.vocab, x.shape[:-1]), jnp.int32)
    return x, w, targets, jnp.asarray(rng.standard_normal(targets.shape), jnp.float32)


def ask_oracle(operands: tuple[jax.Array, ...], **options: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Values and magnitudes of the losses and of the gradients of x and w, tokens in rows.

    A target that is no word may be any: its token must weigh nothing.
    """
    x, w, targets, pull = operands
    x, w, pull = (np.asarray(a, np.float64) for a in (x.reshape(-1, x.shape[-1]), w, pull.ravel()))
    return oracles.lose(x, w, np.asarray(targets).ravel().clip(0), pull, **options)


def ask_oracle_for_sum(
    operands: tuple[jax.Array, ...], factor: float = 1.0, **options: Any
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Value and magnitude of `factor` times the weighted sum, and of its gradients of x, w and the weights."""
    x, w, _, weights = operands
    (loss, *gradients), (near, *others) = ask_oracle(operands, **options)
    flat = np.asarray(weights, np.float64).ravel()
    values, magnitudes = (flat @ loss, *gradients, loss), (np.abs(flat) @ near, *others, near)
    return [
        (factor * value.reshape(shape), abs(factor) * magnitude.reshape(shape))
        for value, magnitude, shape in zip(values, magnitudes, ((), x.shape, w.shape, weights.shape), strict=True)
    ]


def check(backend: Any, operands: tuple[jax.Array, ...], options: dict[str, Any]) -> None:
    """Fails unless loss and gradients are the oracle's."""
    x, w, targets, pull = operands
    settings = {"softcap": None, "z_loss": 0.0} | options

    @jax.jit
    def run(x: jax.Array, w: jax.Array, targets: jax.Array, pull: jax.Array) -> tuple[jax.Array, ...]:
        loss, back = jax.vjp(lambda x, w: backend(x, w, targets, **settings), x, w)
        return (loss, *back(pull))

    wanted, magnitudes = ask_oracle(operands, **options)
    found = run(*operands)
    assert [a.dtype for a in found] == [jnp.float32, x.dtype, w.dtype]
    assert [a.shape for a in found] == [targets.shape, x.shape, w.shape]
    for array, expected, magnitude in zip(found, wanted, magnitudes, strict=True):
        assert_close(array.reshape(expected.shape), expected, magnitude, str(x.dtype))


@pytest.mark.parametrize("name", PORTABLE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradients_match_the_oracle(shape: CrossEntropyShape, name: str) -> None:
    for dtype in ("float32", "bfloat16"):
        check(PORTABLE[name], draw(shape, dtype), {})


def draw_huge() -> tuple[jax.Array, ...]:
    """Over several of the chunked backend's own blocks, the last of each kind ragged; targets at the edges of blocks.

    And each target of many tokens: a word's gradient of one large term, to which those of hundreds of other tokens are
    added one by one, as XLA does on a CPU, would miss float32's tolerance by rounding alone.
    """
    for size, block in ((HUGE.tokens, BLOCK_TOKENS), (HUGE.vocab, BLOCK_VOCAB)):
        assert size > block and size % block
    starts = [*range(0, HUGE.vocab, BLOCK_VOCAB), HUGE.vocab - BLOCK_VOCAB]
    edges = jnp.asarray([edge % HUGE.vocab for start in starts for edge in (start - 1, start)])
    x, w, targets, pull = draw(HUGE, "float32")
    return x, w, edges[targets % len(edges)], pull


@pytest.mark.parametrize("name", ["reference", "chunked"])
def test_huge_loss_and_gradients_match_the_oracle(name: str) -> None:
    check(PORTABLE[name], draw_huge(), {})


@pytest.mark.parametrize("name", PORTABLE)
@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
def test_options_match_the_oracle(options: dict[str, Any], name: str) -> None:
    check(PORTABLE[name], draw(SHAPES[3], "float32"), options)
    check(PORTABLE[name], draw(SHAPES[3], "bfloat16", "bfloat16"), options)


@pytest.mark.parametrize("name", ["reference", "small blocks"])
def test_large_logits_stay_finite(name: str) -> None:
    x, w, targets, pull = draw(SHAPES[3], "float32")
    check(PORTABLE[name], (1e4 * x, w, targets, pull), {})
    check(PORTABLE[name], (1e4 * x, w, targets, pull), {"softcap": 30.0})


@pytest.mark.parametrize("implementation", ["reference", "chunked", None])
def test_a_target_outside_of_the_vocabulary_is_a_nan_of_its_own(implementation: str | None) -> None:
    x, w, targets, _ = draw(SHAPES[2], "float32")
    wrong = targets.at[0, 0, 2].set(50).at[1, 0, 3].set(-1)
    loss = jax.jit(functools.partial(cross_entropy, implementation=implementation))
    found, right = np.array(loss(x, w, wrong)), np.array(loss(x, w, targets))
    assert np.isnan(found[0, 0, 2]) and np.isnan(found[1, 0, 3])
    found[0, 0, 2], found[1, 0, 3] = right[0, 0, 2], right[1, 0, 3]
    np.testing.assert_array_equal(found, right)


def check_sum(operands: tuple[jax.Array, ...], implementation: str, options: dict[str, Any]) -> None:
    """Fails unless a sum and its gradients are the oracle's.

    Half of the tokens weigh nothing, and what comes from behind is not one.
    """
    x, w, targets, weights = operands
    weights = jnp.where(jnp.arange(x.shape[-2]) % 2 == 0, weights, 0.0)
    operands = (x, w, jnp.where(weights == 0.0, -100, targets), weights)
    total = functools.partial(cross_entropy_sum, **options, implementation=implementation)
    found = jax.tree.leaves(jax.jit(jax.value_and_grad(lambda *a: -3.0 * total(*a), (0, 1, 3)))(*operands))
    wanted = ask_oracle_for_sum(operands, -3.0, **{name: options[name] for name in options.keys() - {"chunk"}})
    for array, (expected, magnitude) in zip(found, wanted, strict=True):
        assert_close(array, expected, magnitude, str(x.dtype))
    assert [array.dtype for array in found] == [jnp.float32, x.dtype, w.dtype, jnp.float32]


@pytest.mark.parametrize("options", [{}, {"softcap": 4.0, "z_loss": 0.1, "chunk": 4}], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_and_their_gradients_match_the_oracle(shape: CrossEntropyShape, options: dict[str, Any]) -> None:
    for dtype, implementation in (("float32", "chunked"), ("bfloat16", "chunked"), ("float32", "reference")):
        check_sum(draw(shape, dtype), implementation, options)


def test_a_huge_sum_and_its_gradients_match_the_oracle() -> None:
    check_sum(draw_huge(), "chunked", {})


def test_a_weighed_target_outside_of_the_vocabulary_makes_the_sum_nan() -> None:
    x, w, targets, weights = draw(SHAPES[2], "float32")
    wrong = targets.at[0, 0, 2].set(50)
    assert np.isnan(cross_entropy_sum(x, w, wrong, weights))
    weights = weights.at[0, 0, 2].set(0.0)
    np.testing.assert_array_equal(cross_entropy_sum(x, w, wrong, weights), cross_entropy_sum(x, w, targets, weights))


def test_a_sum_makes_three_products_and_without_a_gradient_one() -> None:
    x, w, targets, weights = draw(SHAPES[3], "float32")
    total = functools.partial(cross_entropy_sum, implementation="chunked")
    for run, products in ((total, 1), (jax.grad(total, (0, 1)), 3)):
        assert str(jax.make_jaxpr(run)(x, w, targets, weights)).count(" dot_general[") == products


def temporary_bytes(tokens: int, vocab: int, loss: Any) -> int:
    """Of the compiled gradient, beyond its arguments and results."""
    x, w = jax.ShapeDtypeStruct((tokens, 16), jnp.float32), jax.ShapeDtypeStruct((16, vocab), jnp.float32)
    grad = jax.grad(lambda x, w, targets: jnp.sum(loss(x, w, targets)), (0, 1))
    program = jax.jit(grad).lower(x, w, jax.ShapeDtypeStruct((tokens,), jnp.int32)).compile()
    size: int = program.memory_analysis().temp_size_in_bytes
    return size


def test_memory_is_linear_in_tokens_and_in_vocabulary() -> None:
    logits = 4 * 4096 * 65536
    whole = temporary_bytes(4096, 65536, functools.partial(cross_entropy, implementation="reference"))
    assert whole >= logits
    for larger, smaller in (((8192, 32768), (4096, 32768)), ((2048, 131072), (2048, 65536))):
        used = temporary_bytes(*larger, cross_entropy)
        assert used < logits / 10
        # The logits of a block (512 x 8192) are the largest part of it, and do not grow; copies of x and w do.
        assert used < 1.5 * temporary_bytes(*smaller, cross_entropy)


def test_a_chunk_says_how_many_tokens_have_logits_at_once() -> None:
    small, large = (temporary_bytes(4096, 4096, functools.partial(cross_entropy, chunk=n)) for n in (64, 1024))
    assert large > 8 * small


def test_a_mesh_gets_the_same_numbers_and_whole_blocks() -> None:
    """Batch over one axis, vocabulary over the other; no block of vocabulary is one device's alone."""
    operands = draw(CrossEntropyShape(lead=(4,), tokens=12, embed=16, vocab=64), "float32")
    loss = functools.partial(cross_entropy_chunked, softcap=None, z_loss=0.1, chunk=4, block_vocab=16)
    run = jax.value_and_grad(lambda x, w, t, g: jnp.sum(g * loss(x, w, t)), (0, 1))
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        spread = [
            jax.device_put(a, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)))
            for a, axes in zip(operands, (("data",), (None, "model"), ("data",), ("data",)), strict=True)
        ]
        program = jax.jit(run).lower(*spread).compile()
        found = jax.tree.leaves(program(*spread))
    wanted = ask_oracle_for_sum(operands, z_loss=0.1)[:3]
    # Magnitudes bound what rounding could do to a sum of many terms; it does not come near that of the largest.
    for array, (expected, magnitude), most in zip(found, wanted, (100.0, 10.0, 100.0), strict=True):
        assert_close(array, expected, np.minimum(magnitude, most), "float32")
    assert "f32[2,4,16]" in program.as_text()  # a device's logits: half of the batch, 4 tokens, a quarter of V
    assert "all-gather" not in program.as_text()


X, W, TARGETS = jnp.ones((2, 3, 8)), jnp.ones((8, 5)), jnp.zeros((2, 3), jnp.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": X[..., :7]}, "x contracts over 7, w over 8"),
        ({"x": X[0, 0], "targets": TARGETS[0, 0]}, r"needs x \(..., T, D\), got shape \(8,\)"),
        ({"w": W[0]}, r"needs w \(D, V\) that is not empty, got shape \(5,\)"),
        ({"w": W[:, :0]}, r"got shape \(8, 0\)"),
        ({"targets": TARGETS[0]}, r"targets have shape \(3,\), x needs \(2, 3\)"),
        ({"targets": TARGETS.astype(jnp.float32)}, "targets must be integers, got float32"),
        ({"x": X.astype(jnp.float16)}, "x of float32 or bfloat16, not of float16"),
        ({"w": W.astype(jnp.int8)}, "w of float32 or bfloat16, not of int8"),
        *list_wrong_caps("softcap"),
        *list_wrong_counts("chunk"),
        *(({"z_loss": value}, f"z_loss={value} must be at least 0") for value in (-1.0, 10**39, np.inf, np.nan)),
        ({"implementation": "fast"}, "unknown implementation 'fast' of cross_entropy: valid are chunked, reference"),
    ],
)
def test_refusals_name_both_values(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": X, "w": W, "targets": TARGETS} | changes
    with pytest.raises(ValueError, match=message):
        cross_entropy(**arguments)


def test_weights_must_be_those_of_the_targets() -> None:
    with pytest.raises(ValueError, match=r"weights are float32 \(3,\), must be float32 \(2, 3\)"):
        cross_entropy_sum(X, W, TARGETS, jnp.ones(3))
    with pytest.raises(ValueError, match="weights are int32"):
        cross_entropy_sum(X, W, TARGETS, TARGETS)


def test_no_tokens_give_no_losses() -> None:
    assert cross_entropy(X[:, :0], W, TARGETS[:, :0]).shape == (2, 0)
    assert cross_entropy_sum(X[:, :0], W, TARGETS[:, :0], jnp.ones((2, 0))) == 0.0
