"""`project`: x @ w for a dense or packed weight; only here and in multiply.py is a weight's format asked for.

B batch, T query, D contraction, F outputs, V vocabulary.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from hsai.formats.layer import LayerOf
from hsai.formats.multiply import are_alike, multiply_packed
from hsai.formats.observed import Observed, Tapped
from hsai.formats.outliers import Outliers
from hsai.formats.packed import Packed, Weight, to_dense
from hsai.sharding import Axes, constrain
from hsai.shards import add_parts, find_splits, map_shards
from hsai_kernels.dispatch import count_devices


def project(
    x: jax.Array, w: Weight, *, out_axes: Axes, in_axis: str | None = None, out_dtype: DTypeLike | None = None
) -> jax.Array:
    """x @ w for a dense or packed weight.

    On a mesh each device multiplies its part of x by its part of a packed weight, with the kernel of one device.

    Args:
      x: (..., D) activations, bfloat16 or float32.
      w: dense (D, F), or any packed format with that logical shape.
      out_axes: logical axes of the result.
      in_axis: logical axis of the contraction. Where x's is split over a mesh, so is that of a packed weight, and the
        parts of the sum are added in float32; without a name every device has the contraction whole.
      out_dtype: of the result, x's by default; float32 keeps what bfloat16 products sum to, as logits need it.
    Returns: (..., F), constrained to `out_axes`.
    """
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    if isinstance(w, LayerOf) and count_devices() > 1:  # each device has a part of the layer, and of its own stack
        w = w.cut()
    if isinstance(w, Observed):
        w.notes.add(w.name, x)
        w = w.value
    if isinstance(w, Tapped):
        return w.tap(project(x, w.value, out_axes=out_axes, in_axis=in_axis, out_dtype=out_dtype))
    if isinstance(w, Outliers):
        rest = project(x, w.base, out_axes=out_axes, in_axis=in_axis, out_dtype=out_dtype)
        few = _multiply(jnp.dtype(jnp.float32), jnp.take(x, w.index[:, 0], axis=-1, mode="clip"), w.rows)
        y = (rest.astype(jnp.float32) + few).astype(out_dtype)
    elif isinstance(w, LayerOf):
        (y,) = multiply_packed(x.astype(out_dtype), w)
    elif isinstance(w, Packed):  # the kernels answer in the dtype of their activations, and round no weight
        y = _multiply_parts(x.astype(out_dtype), w, in_axis, out_axes)
    else:
        y = _multiply(out_dtype, x, w)
    return constrain(y, *out_axes)


def project_all(
    x: jax.Array, weights: Sequence[Weight], *, out_axes: Sequence[Axes], in_axis: str | None = None
) -> list[jax.Array]:
    """`project` of x with several weights, each with axes of its own.

    Packed weights that are alike are multiplied by in one call on one device: of a token that is decoded, what happens
    between products takes as long as small ones.
    """
    if count_devices() > 1 or not are_alike(weights):
        return [project(x, w, out_axes=axes, in_axis=in_axis) for w, axes in zip(weights, out_axes, strict=True)]
    return [constrain(y, *axes) for y, axes in zip(multiply_packed(x, *weights), out_axes, strict=True)]


def _multiply_parts(x: jax.Array, w: Packed, in_axis: str | None, out_axes: Axes) -> jax.Array:
    """x @ w, (..., F) in x's dtype, each device's part by a kernel. Columns are split as the result is.

    The batch claims its mesh axes first: a weight that is stored split over them is collected, packed as it is.
    """
    x_axes, w_axes = (*out_axes[:-1], in_axis), (in_axis, out_axes[-1])
    whole = jax.ShapeDtypeStruct((w.shape[-2] // w.unit, w.shape[-1]), jnp.int32)
    splits = find_splits((x_axes, x), (w_axes, w), (w_axes, whole))
    parts = splits.get(in_axis, ()) if in_axis is not None else ()

    def multiply(x: jax.Array, w: Packed) -> jax.Array:
        # A part of the sum is not rounded before the others are added to it.
        (y,) = multiply_packed(x.astype(jnp.float32) if parts else x, w)
        return add_parts(y, parts).astype(x.dtype)

    y: jax.Array = map_shards(multiply, splits, (x_axes, w_axes), out_axes)(x, w)
    return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(out_dtype: jnp.dtype, x: jax.Array, w: jax.Array) -> jax.Array:
    """x @ w for a dense weight, (..., D) and (D, F), which is rounded to x's dtype first.

    The gradients are jax's own, but for two things. The weight's is asked for as (D, F): jax would form it as (F, D)
    and turn it, for which XLA on a CPU first turns the gradient of the result, and spends a fifth of a training step on
    that. And it is summed, sent between devices and handed on in w's own dtype, float32 while training, not in x's.
    """
    return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=out_dtype)


def _multiply_forward(
    out_dtype: jnp.dtype, x: jax.Array, w: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # In the open, where rematerialization sees that it is a product: `_multiply` would hide it.
    return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=out_dtype), (x, w)


def _multiply_backward(
    out_dtype: jnp.dtype, saved: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    grad = grad.astype(x.dtype)
    lead = tuple(range(x.ndim - 1))
    d_w = jax.lax.dot_general(x, grad, ((lead, lead), ((), ())), preferred_element_type=w.dtype)
    return jnp.einsum("...f,df->...d", grad, w.astype(x.dtype)), d_w


_multiply.defvjp(_multiply_forward, _multiply_backward)


def dense_operands(x: jax.Array, w: Weight) -> tuple[jax.Array, jax.Array]:
    """x and w for a kernel that multiplies by dense weights only, and rounds them to the dtype of x.

    A packed weight is rebuilt, and x then float32: as in `project`, what was rounded to few bits is not rounded again.
    """
    return (x.astype(jnp.float32), w.dense()) if isinstance(w, Packed) else (x, w)


def lookup(w: Weight, ids: jax.Array, *, dtype: jnp.dtype, out_axes: Axes) -> jax.Array:
    """The columns of w that `ids` name: the embedding table is a weight (D, V) like any other.

    Args:
      w: (D, V), dense or packed.
      ids: (B, T) int32 in [0, V); the caller has checked the range.
      dtype: of the result.
      out_axes: logical axes of the result.
    Returns: (B, T, D), constrained to `out_axes`.
    """
    if isinstance(w, Tapped):
        return w.tap(lookup(w.value, ids, dtype=dtype, out_axes=out_axes))
    # The table is collected over the axes of the batch, as for a product; each device then reads its own tokens.
    whole = jax.tree.map(lambda leaf: constrain(leaf, None, "vocab"), w)
    flat = ids.reshape(-1)
    columns = whole.take(flat) if isinstance(whole, Packed) else jnp.take(whole, flat, axis=-1, mode="clip")
    columns = jax.tree.map(lambda leaf: constrain(leaf, None, "batch"), columns)
    rows = to_dense(columns).T.reshape(*ids.shape, -1)
    return constrain(rows.astype(dtype), *out_axes)
