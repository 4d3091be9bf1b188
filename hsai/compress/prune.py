"""Pruning by magnitude: what a sparse format keeps are the largest weights of each of its groups.

Magnitude needs no data. For a densely trained model it is the baseline that better masks are held against
(`hsai.compress.wanda`, `hsai.compress.solver`); one that was trained with this sparsity (`hsai.train.formats`) comes
with its masks.

D contraction, F outputs.
"""

import jax
import jax.numpy as jnp

from hsai.compress.quantize import map_layers, search_scale
from hsai.formats import Packed, SparseConfig
from hsai.formats.sparse import CodeValues


def prune(w: jax.Array, config: SparseConfig) -> Packed:
    """(D, F) or stacked (L, D, F), float -> the kept values in the config's format, and where they stand."""
    return map_layers(lambda layer: prune_to_mask(layer, config.mask(layer), config), w)


def prune_to_mask(w: jax.Array, mask: jax.Array, config: SparseConfig) -> Packed:
    """w (D, F), float, with the mask bool (D, F) of what is kept, which the config's pattern allows.

    Of 4-bit codes scales are searched over what is kept, mask first and scale after it: pruned weights are zero, which
    every scale holds exactly, so that the scale serves the kept ones alone.
    """
    if not isinstance(config, CodeValues):
        return config.pack(w, mask)
    w = w.astype(jnp.float32)
    return config.pack(w, mask, search_scale(jnp.where(mask, w, 0.0), config))
