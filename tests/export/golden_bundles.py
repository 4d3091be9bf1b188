"""Bundles as a version of the format wrote them, kept to be read for ever: tests/export/golden/VERSION/NAME.

    python -m tests.export.golden_bundles

writes those of today's FORMAT_VERSION, each with the logits that it gave; what is there already is never written again.
Between them they have every format, layers of different formats, a tied and an own head, both kinds of cache, assets.
"""

from pathlib import Path

import jax
import numpy as np

from hsai.export import GraphConfig, write_bundle
from hsai.export.manifest import FORMAT_VERSION
from hsai.files import atomic_write
from hsai.formats import (
    Int4Config,
    Rounded,
    TernaryConfig,
    UnstructuredConfig,
    UnstructuredInt4Config,
    UnstructuredInt8Config,
    VNMInt8Config,
    stack_layers,
)
from hsai.formats.storage import named_weights, replace_weights
from hsai.models import Transformer
from tests.export.tiny_models import CHATTY_ASSETS, FORMATS, full_logits, make_chatty_tokenizer, make_model

GOLDEN = Path(__file__).parent / "golden"
LOGITS = "logits.npy"
"""float32 (T, V) of PROMPT, beside the bundle's directory."""

PROMPT = (3, 17, 250, 99, 41, 7, 200, 5, 5, 130, 61, 12)
PACKS = {name: config.pack for name, config in FORMATS.items()} | {
    "ternary": TernaryConfig(group=64).pack,
    "rounded": lambda w: Rounded(Int4Config().pack(w)),
    "vnm_int8": VNMInt8Config(v=16).pack,
    "unstructured": UnstructuredConfig().pack,
    "unstructured_int8": UnstructuredInt8Config().pack,
    "unstructured_int4": UnstructuredInt4Config().pack,
}
SMALL = {"vocab": 288, "mlp": 128, "heads": 2, "kv_heads": 1, "head_dim": 64, "max_length": 32}
LOW_BITS = {"embed": "int8", "q": "int4", "k": "int3", "v": "int2", "o": "ternary", "gate": "dense", "up": "int8"}
OFFSET = {"embed": "int4_offset", "q": "int4_offset", "v": "int4_offset", "gate": "int4_offset", "up": "int4"}
SPARSE = {"embed": "int4", "q": "nm", "k": "nm_int8", "v": "nm_int4", "o": "vnm", "gate": "vnm_int4", "unembed": "int3"}
APART = {
    "embed": "outliers",
    "q": "rounded",
    "k": "unstructured",
    "v": "unstructured_int8",
    "o": "unstructured_int4",
    "gate": "vnm_int8",
}


def make_golden(formats: dict[str, str], down: tuple[str, str], *, tied: bool, dtype: str) -> Transformer:
    """Random weights in `formats`, by the last part of their names; the layers' down-projections each in its own."""
    model = make_model(**SMALL, tie_embeddings=tied, dtype=dtype)
    values = {}
    for name, param in named_weights(model).items():
        value, last = param.get_value(), name.rpartition(".")[2]
        if last == "down":
            values[name] = stack_layers([PACKS[kind](layer) for kind, layer in zip(down, value, strict=True)])
        elif last in formats:
            values[name] = PACKS[formats[last]](value)
    return replace_weights(model, values)


def main() -> None:
    """Writes what is not there."""
    bundles = {
        "low_bits": (make_golden(LOW_BITS, ("int4", "int8"), tied=True, dtype="float32"), "activations"),
        "offset": (make_golden(OFFSET, ("int4_offset", "int4_offset"), tied=True, dtype="float32"), "activations"),
        "apart": (make_golden(APART, ("outliers", "outliers"), tied=True, dtype="float32"), "activations"),
        "sparse": (make_golden(SPARSE, ("nm_int4", "nm_int4"), tied=False, dtype="bfloat16"), "int8"),
    }
    for name, (model, cache) in bundles.items():
        target = GOLDEN / str(FORMAT_VERSION) / name
        if not target.exists():
            graphs = GraphConfig(prefill_buckets=(8,), cache=cache)
            write_bundle(target, model, make_chatty_tokenizer(), graphs=graphs, assets=CHATTY_ASSETS)
            with atomic_write(target.with_name(f"{name}_{LOGITS}")) as temporary, open(temporary, "wb") as file:
                np.save(file, np.asarray(jax.device_get(full_logits(model, np.array(PROMPT))), np.float32))


if __name__ == "__main__":
    main()
