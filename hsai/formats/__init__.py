"""Weight values: a dense `jax.Array`, or one of the packed pytrees below; `project` multiplies by any of them.

A weight is always stored as (..., D, F): contraction first, outputs last, with any stacked dimensions (layers) in
front. A packed value has the same logical shape, holds fewer bytes, and sits in the model where the dense array sat.
"""

from hsai.formats.codes import Int2, Int2Config, Int3, Int3Config, Int4, Int4Config
from hsai.formats.int8 import Int8, Int8Config
from hsai.formats.nm import NM, NMConfig, nm_mask
from hsai.formats.nm_int4 import NMInt4, NMInt4Config
from hsai.formats.nm_int8 import NMInt8, NMInt8Config
from hsai.formats.packed import Dense, DenseConfig, Packed, Weight, bits_per_weight, is_packed_as, nbytes, to_dense
from hsai.formats.project import dense_operands, lookup, project
from hsai.formats.ragged import project_sorted
from hsai.formats.runs import Runs, scan_layers, stack_layers, take_layer
from hsai.formats.ternary import Ternary, TernaryConfig
from hsai.formats.vnm import VNM, VNMConfig, VNMInt4, VNMInt4Config, vnm_mask

FormatConfig = (
    DenseConfig
    | Int8Config
    | Int4Config
    | Int3Config
    | Int2Config
    | TernaryConfig
    | NMConfig
    | NMInt8Config
    | NMInt4Config
    | VNMConfig
    | VNMInt4Config
)

__all__ = [
    "NM",
    "VNM",
    "Dense",
    "DenseConfig",
    "FormatConfig",
    "Int2",
    "Int2Config",
    "Int3",
    "Int3Config",
    "Int4",
    "Int4Config",
    "Int8",
    "Int8Config",
    "NMConfig",
    "NMInt4",
    "NMInt4Config",
    "NMInt8",
    "NMInt8Config",
    "Packed",
    "Runs",
    "Ternary",
    "TernaryConfig",
    "VNMConfig",
    "VNMInt4",
    "VNMInt4Config",
    "Weight",
    "bits_per_weight",
    "dense_operands",
    "is_packed_as",
    "lookup",
    "nbytes",
    "nm_mask",
    "project",
    "project_sorted",
    "scan_layers",
    "stack_layers",
    "take_layer",
    "to_dense",
    "vnm_mask",
]
