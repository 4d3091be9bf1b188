"""Models, written once: the same `__call__` trains, prefills and decodes, on any mesh and with any weight format."""

from hsai.models.cache import CacheFormat, KVCache
from hsai.models.moe import MoEConfig
from hsai.models.rope import RopeConfig, RopeScaling
from hsai.models.transformer import Remat, Transformer, TransformerConfig

__all__ = [
    "CacheFormat",
    "KVCache",
    "MoEConfig",
    "Remat",
    "RopeConfig",
    "RopeScaling",
    "Transformer",
    "TransformerConfig",
]
