"""llama.cpp's own quantization through llama-cpp-python, with an importance matrix of our calibration text.

llama-imatrix gathers, for every product of a block, the mean square of each input over a text, of an expert's over the
tokens that it got: what Wanda's norms are made of here. So both sides calibrate on the same text. The embedding and the
head have no importance there.
"""

import ctypes
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hsai.compress.stream import Grams, Streams, stream_blocks
from hsai.interop.gguf_names import ARCHITECTURES, list_entries
from hsai.models import Transformer
from hsai.models.transformer import Block

KINDS = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_1", "Q4_0", "Q3_K_M", "Q2_K", "IQ3_XXS", "IQ2_XS")

TABLES = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL")
"""What a table of any width may be told to be; by itself llama.cpp gives one that is the head as well 6 or 8 bits."""


def read_kind(text: str) -> str:
    """`text`, a KIND or KIND/TABLE.

    Raises:
      ValueError: it is neither.
    """
    kind, slash, table = text.partition("/")
    if kind not in KINDS or (slash and table not in TABLES):
        raise ValueError(f"{text!r} is none of {', '.join(KINDS)}, nor one of them with /{', /'.join(TABLES)}")
    return text


def measure_importance(model: Transformer, tokens: np.ndarray, *, batch: int) -> dict[str, np.ndarray]:
    """The mean square of each input of each block's products, float32 (D,), of experts (E D,), by the tensor's name in
    GGUF.

    Args:
      model: dense.
      tokens: int32 (N, T), the calibration.
      batch: sequences at a time.
    """
    found: dict[tuple[str, int], np.ndarray] = {}

    def keep(layer: int, block: Block, grams: Grams, streams: Streams) -> Block:
        for name, squares in streams.squares.items():
            rows = np.maximum(streams.counts[name], 1)[..., None]
            found[f"layers.{name}", layer] = (np.asarray(squares) / rows).astype(np.float32).reshape(-1)
        return block

    stream_blocks(model, tokens, batch=batch, solve=keep)
    entries = list_entries(ARCHITECTURES["llama"], model.config)
    return {
        entry.name: found[entry.leaf, entry.index[0]]
        for entry in entries
        if entry.index and (entry.leaf, entry.index[0]) in found
    }


def quantize(source: Path, target: Path, kind: str, importance: Mapping[str, np.ndarray]) -> None:
    """Writes `target`, the GGUF file `source` as `read_kind` has it, as `llama-quantize --imatrix` does; a TABLE is
    what it calls `--token-embedding-type` and `--output-tensor-type`.

    Raises:
      RuntimeError: llama.cpp does not do it.
    """
    import llama_cpp

    rows = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()  # the last one, without a name, ends it
    for row, (name, values) in zip(rows, importance.items(), strict=False):
        row.name, row.size = name.encode(), values.size
        row.data = np.ascontiguousarray(values, np.float32).ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params = llama_cpp.llama_model_quantize_default_params()
    blocks, _, table = read_kind(kind).partition("/")
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{blocks}")
    if table:
        params.token_embedding_type = params.output_tensor_type = getattr(llama_cpp, f"GGML_TYPE_{table}")
    params.imatrix = ctypes.cast(rows, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    if status:
        raise RuntimeError(f"llama.cpp could not write {target} as {kind}: status {status}")
