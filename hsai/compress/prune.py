"""Pruning by magnitude: of every m weights along the contraction the n largest stay (N:M, or V:N:M).

Magnitude needs no data. For a densely trained model it is the baseline that better masks are held against; one that was
trained with this sparsity (`hsai.train.formats`) comes with its masks.

D contraction, F outputs.
"""

import jax
import jax.numpy as jnp

from hsai.compress.quantize import map_layers, search_scale
from hsai.formats import NMConfig, NMInt4Config, NMInt8Config, Packed, VNMConfig, VNMInt4Config


def prune(w: jax.Array, config: NMConfig | NMInt8Config | VNMConfig) -> Packed:
    """(D, F) or stacked (L, D, F), float -> the kept values in the config's precision, and where they stand."""
    return map_layers(config.pack, w)


def prune_int4(w: jax.Array, config: NMInt4Config | VNMInt4Config) -> Packed:
    """(D, F) or stacked (L, D, F), float -> kept values in 4 bits, with scales searched over what is kept.

    The mask comes first and the scale after it: pruned weights are zero, which every scale holds exactly, so that the
    scale serves the kept ones alone.
    """

    def pack(layer: jax.Array) -> Packed:
        layer = layer.astype(jnp.float32)
        mask = config.mask(layer)
        return config.pack(layer, mask, search_scale(jnp.where(mask, layer, 0.0), config))

    return map_layers(pack, w)
