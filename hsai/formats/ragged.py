"""`project_sorted`: each row times the weight of its expert; as `project`, for experts.

R rows, E experts, D contraction, F outputs.
"""

import jax
import jax.numpy as jnp

from hsai.formats.observed import Observed, Tapped
from hsai.formats.packed import Weight, to_dense


def project_sorted(x: jax.Array, w: Weight, sizes: jax.Array) -> jax.Array:
    """x @ w[expert of the row], for rows that are sorted by their expert.

    Args:
      x: (R, D) activations. What lies behind the last expert's rows belongs to nobody, and must be zero.
      w: (E, D, F), dense or packed.
      sizes: int32 (E,), rows of each expert.
    Returns: (R, F) in x's dtype; zero for rows that belong to nobody.
    """
    if isinstance(w, Observed):
        w.notes.add(w.name, x, sizes)
        w = w.value
    if isinstance(w, Tapped):
        return w.tap(project_sorted(x, w.value, sizes), sizes)
    y = jax.lax.ragged_dot(x, to_dense(w).astype(x.dtype), sizes, preferred_element_type=x.dtype)
    # What a backend leaves in rows that no group reaches must get neither into results nor into gradients.
    return jnp.where((jnp.arange(x.shape[0]) < jnp.sum(sizes))[:, None], y, 0)
