"""The way out: a model as a directory that needs no Python code of ours to be run elsewhere.

`bundle.py` writes and reads the directory, `manifest.py` says what stands in it, `steps.py` is what its graphs compute,
`stablehlo.py` turns those steps into files. What `hsai compress` writes is the same directory, without graphs.
"""

from hsai.export.bundle import Bundle, read_bundle, write_bundle
from hsai.export.manifest import FORMAT_VERSION, GraphRecord, Manifest
from hsai.export.stablehlo import GraphConfig, export_graphs, load_graph

__all__ = [
    "FORMAT_VERSION",
    "Bundle",
    "GraphConfig",
    "GraphRecord",
    "Manifest",
    "export_graphs",
    "load_graph",
    "read_bundle",
    "write_bundle",
]
