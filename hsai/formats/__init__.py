"""Weight values: a dense `jax.Array`, or one of the packed pytrees below; `project` multiplies by any of them.

A weight is always stored as (..., D, F): contraction first, outputs last, with any stacked dimensions (layers) in
front. A packed value has the same logical shape, holds fewer bytes, and sits in the model where the dense array sat.
"""

from hsai.formats.activations import find_activations, take_activations
from hsai.formats.codes import Int2, Int2Config, Int3, Int3Config, Int4, Int4Config
from hsai.formats.int4_offset import Int4Offset, Int4OffsetConfig
from hsai.formats.int8 import Int8, Int8Config
from hsai.formats.nm import NM, NMConfig, NMInt4, NMInt4Config, NMInt8, NMInt8Config, nm_mask
from hsai.formats.outliers import Outliers, OutliersConfig, PlainConfig
from hsai.formats.packed import Dense, DenseConfig, Packed, Weight, bits_per_weight, is_packed_as, nbytes, to_dense
from hsai.formats.project import dense_operands, lookup, project, project_all
from hsai.formats.ragged import project_sorted
from hsai.formats.rounded import Activations, Rounded
from hsai.formats.runs import Runs, scan_layers, stack_layers, take_layer
from hsai.formats.sparse import Sparse, SparseConfig
from hsai.formats.ternary import Ternary, TernaryConfig
from hsai.formats.unstructured import (
    Unstructured,
    UnstructuredConfig,
    UnstructuredInt4,
    UnstructuredInt4Config,
    UnstructuredInt8,
    UnstructuredInt8Config,
)
from hsai.formats.vnm import VNM, VNMConfig, VNMInt4, VNMInt4Config, VNMInt8, VNMInt8Config, vnm_mask

FormatConfig = DenseConfig | PlainConfig | OutliersConfig

__all__ = [
    "NM",
    "VNM",
    "Activations",
    "Dense",
    "DenseConfig",
    "FormatConfig",
    "Int2",
    "Int2Config",
    "Int3",
    "Int3Config",
    "Int4",
    "Int4Config",
    "Int4Offset",
    "Int4OffsetConfig",
    "Int8",
    "Int8Config",
    "NMConfig",
    "NMInt4",
    "NMInt4Config",
    "NMInt8",
    "NMInt8Config",
    "Outliers",
    "OutliersConfig",
    "Packed",
    "PlainConfig",
    "Rounded",
    "Runs",
    "Sparse",
    "SparseConfig",
    "Ternary",
    "TernaryConfig",
    "Unstructured",
    "UnstructuredConfig",
    "UnstructuredInt4",
    "UnstructuredInt4Config",
    "UnstructuredInt8",
    "UnstructuredInt8Config",
    "VNMConfig",
    "VNMInt4",
    "VNMInt4Config",
    "VNMInt8",
    "VNMInt8Config",
    "Weight",
    "bits_per_weight",
    "dense_operands",
    "find_activations",
    "is_packed_as",
    "lookup",
    "nbytes",
    "nm_mask",
    "project",
    "project_all",
    "project_sorted",
    "scan_layers",
    "stack_layers",
    "take_activations",
    "take_layer",
    "to_dense",
    "vnm_mask",
]
