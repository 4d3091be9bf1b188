"""Writes a model as a GGUF file that llama.cpp loads and agrees with."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import gguf
import jax
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType

from hsai.errors import InputError
from hsai.files import atomic_write
from hsai.formats import Int4Offset, Packed, Weight
from hsai.formats.storage import named_weights
from hsai.interop.assemble import disassemble
from hsai.interop.entries import Entry
from hsai.interop.gguf_blocks import join_q4_1, quantize
from hsai.interop.gguf_config import write_config
from hsai.interop.gguf_names import ROPE_FACTORS, list_entries
from hsai.interop.gguf_tokenizer import GgufTokenizer
from hsai.interop.gguf_vocabulary import describe_tokenizer
from hsai.models import Transformer
from hsai_kernels import unpack_words

Type = GGMLQuantizationType
GgufType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"]

_TYPES: Mapping[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f32": (Type.F32, LlamaFileType.ALL_F32),
    "f16": (Type.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (Type.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (Type.Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "q4_1": (Type.Q4_1, LlamaFileType.MOSTLY_Q4_1),
}
# The largest magnitude whose scale, or which itself (as a minimum), is a finite float16.
_LARGEST = {Type.F16: 65504.0, Type.Q8_0: 65504.0 * 127, Type.Q4_0: 65504.0 * 8, Type.Q4_1: 65504.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufRecord:
    """What was written."""

    architecture: str
    """As llama.cpp calls it."""

    tensors: int
    """How many."""

    fallbacks: tuple[str, ...]
    """Matrices that are float16, since their rows are no multiple of the block of the type that was asked for."""

    ignores_window: bool
    """llama.cpp lets this architecture see beyond the window that the model has (Mistral)."""


def write_gguf(
    path: str | os.PathLike[str],
    model: Transformer,
    tokenizer: GgufTokenizer,
    *,
    dtype: GgufType = "f16",
    dequantize: bool = False,
    about: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GgufRecord:
    """Writes the file, tensor by tensor, whole or not at all.

    Gains, biases and the router of experts stay float32, as in llama.cpp's own files. In a q4_0 or q4_1 file, the table
    that projects to logits is Q8_0: its errors reach the logits undamped, and llama.cpp keeps more bits for it, too.
    Weights that are packed as int4_offset in groups of 32 are in a q4_1 file what they are here, the table as well.

    Args:
      path: of the file; what stands there is replaced.
      model: of a family that llama.cpp has.
      tokenizer: with at most as many tokens as the model.
      dtype: of the matrices.
      dequantize: writes the numbers that packed weights stand for.
      about: `general.*` keys: name, license, ...
      progress: called with (tensors done, tensors in all).
    Raises:
      InputError: llama.cpp has no such model or tokenizer; weights are packed, not as blocks of `dtype`, and not to be
        dequantized; a weight is beyond the range of `dtype`.
    """
    if dtype not in _TYPES:
        raise InputError(f"no GGUF type {dtype!r}; those that are written are {', '.join(get_args(GgufType))}")
    kind, file_type = _TYPES[dtype]
    architecture, metadata, factors = write_config(model.config)
    metadata |= {f"general.{key}": value for key, value in (about or {}).items()}
    metadata |= {"general.file_type": int(file_type), "general.quantization_version": gguf.GGML_QUANT_VERSION}
    metadata |= describe_tokenizer(tokenizer, model.config.vocab)
    entries = list_entries(architecture, model.config)
    values = {name: param.get_value() for name, param in named_weights(model).items()}
    leaves = {name: value.shape for name, value in values.items()}
    kept = {name: _take_blocks for name, value in values.items() if kind == Type.Q4_1 and _is_q4_1(value)}
    kinds, fallbacks = {}, []
    for entry in entries:
        kinds[entry.name], fell = _choose(entry, entry.shape(leaves[entry.leaf]), kind, model.config.tie_embeddings)
        if entry.leaf in kept:
            kinds[entry.name], fell = kind, False
        fallbacks += [entry.name] if fell else []
    tensors = disassemble(model, entries, dequantize=dequantize, kept=kept)
    first = next(tensors)  # what is refused is refused before anything is written
    with atomic_write(path) as temporary:
        writer = GGUFWriter(temporary, architecture.name)
        try:
            add_metadata(writer, metadata)
            if factors is not None:
                writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes, Type.F32)
            for entry in entries:
                _add_tensor(writer, entry.name, entry.shape(leaves[entry.leaf]), kinds[entry.name])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            if factors is not None:
                writer.write_tensor_data(factors)
            done = 0
            for entry, tensor in _chain(first, tensors):
                if entry.leaf not in kept:
                    tensor = _encode(entry.name, np.asarray(tensor, np.float32), kinds[entry.name])
                writer.write_tensor_data(tensor)
                done += 1
                if progress is not None:
                    progress(done, len(entries))
        finally:
            writer.close()
    window = model.config.sliding_window
    ignored = architecture.ignores_windows and window is not None and window < model.config.max_length
    return GgufRecord(
        architecture=architecture.name, tensors=len(entries), fallbacks=tuple(fallbacks), ignores_window=ignored
    )


def _chain(first: Any, rest: Any) -> Any:
    yield first
    yield from rest


def _choose(
    entry: Entry, shape: tuple[int, ...], kind: GGMLQuantizationType, tied: bool
) -> tuple[GGMLQuantizationType, bool]:
    """How a tensor is stored, and whether that is for want of whole blocks."""
    if len(shape) < 2 or entry.name.endswith("ffn_gate_inp.weight"):
        return Type.F32, False
    if kind in (Type.Q4_0, Type.Q4_1) and entry.name == ("token_embd.weight" if tied else "output.weight"):
        kind = Type.Q8_0
    if shape[-1] % GGML_QUANT_SIZES[kind][0]:
        return Type.F16, True
    return kind, False


def _add_tensor(writer: GGUFWriter, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> None:
    block, size = GGML_QUANT_SIZES[kind]
    stored = (*shape[:-1], shape[-1] // block * size)  # gguf takes the shape of the bytes
    if kind in (Type.F32, Type.F16):
        dtype = np.dtype(np.float32 if kind == Type.F32 else np.float16)
        writer.add_tensor_info(name, shape, dtype, int(np.prod(stored)), kind)
    else:
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), int(np.prod(stored)), kind)


def _is_q4_1(value: Weight) -> bool:
    """Whether a weight is blocks of Q4_1: those of its contraction, which is the row of a tensor in the file."""
    return isinstance(value, Int4Offset) and value.shape[-2] == 32 * value.scale.shape[-2]


def _take_blocks(entry: Entry, piece: Packed) -> np.ndarray:
    """The bytes of a tensor of Q4_1."""
    assert isinstance(piece, Int4Offset)
    parts = (unpack_words(piece.words, 4), piece.scale, piece.minimum)
    return join_q4_1(*(entry.to_foreign(np.asarray(jax.device_get(part))) for part in parts))


def _encode(name: str, tensor: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    largest = float(np.abs(tensor).max())
    if not largest <= _LARGEST.get(kind, float(np.finfo(np.float32).max)):
        raise InputError(f"tensor {name!r} holds {largest:g}, which {kind.name.lower()} cannot say; take bf16 or f32")
    return quantize(kind, tensor)


def add_metadata(writer: GGUFWriter, metadata: Mapping[str, Any]) -> None:
    """Adds keys, each of the type of its value; integers are uint32."""
    for key, value in metadata.items():
        if key == "general.architecture":
            continue  # GGUFWriter has written it
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
