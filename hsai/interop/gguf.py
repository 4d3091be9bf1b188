"""Models in GGUF files, in: header, config and tensors checked against one another; `assemble` reads the tensors."""

import dataclasses
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType

from hsai.errors import InputError
from hsai.formats.storage import named_weights
from hsai.interop.entries import Entry, check_names
from hsai.interop.gguf_config import read_config
from hsai.interop.gguf_container import GgufFile, open_gguf
from hsai.interop.gguf_names import ROPE_FACTORS, Architecture, list_entries
from hsai.interop.gguf_tokenizer import GgufTokenizer, read_tokenizer
from hsai.models import TransformerConfig
from hsai.models.transformer import abstract_transformer

EMBEDDING = "token_embd.weight"
SUFFIX = ".gguf"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufCheckpoint:
    """A file whose header fits the model that its metadata describe; its tensors were not read yet."""

    file: GgufFile
    """The header."""

    architecture: Architecture
    """Of llama.cpp."""

    config: TransformerConfig
    """The model; activations are float32, since weights that were rounded for a CPU are meant to run on one."""

    tokenizer: GgufTokenizer
    """And what the file says beside it."""

    @property
    def dtype(self) -> np.dtype:
        """What weights are to be stored in so that none is rounded: bfloat16 if they all fit it, else float32.

        Such files keep gains and biases in float32, whatever they were: those are looked at.
        """
        entries = self.list_entries()
        vectors = [entry for entry in entries if len(self.file.tensors[entry.name].shape) == 1]
        kinds = {self.file.tensors[entry.name].type for entry in entries if entry not in vectors}
        if kinds != {GGMLQuantizationType.BF16}:
            return jnp.dtype(jnp.float32)
        values = (entry.to_ours(self.read(entry)) for entry in vectors)
        exact = all(np.array_equal(value, value.astype(jnp.bfloat16)) for value in values)
        return jnp.dtype(jnp.bfloat16 if exact else jnp.float32)

    @property
    def path(self) -> Path:
        """The file."""
        return self.file.path

    def list_entries(self) -> list[Entry]:
        """A tensor each."""
        return list_entries(self.architecture, self.config)

    def read(self, entry: Entry) -> np.ndarray:
        """The tensor of an entry, dequantized; `InputError` if it has a quantization that is not read."""
        return self.file.read(entry.name)


def is_gguf(path: Path) -> bool:
    """Whether a path is to be read as a GGUF file: all other models are directories."""
    return path.is_file() or path.suffix == SUFFIX and not path.is_dir()


def open_gguf_checkpoint(path: str | os.PathLike[str]) -> GgufCheckpoint:
    """Reads the header of a model's file and its tokenizer.

    Raises:
      InputError: what `open_gguf`, `read_config` and `read_tokenizer` refuse; a tensor is missing, unknown, or has
        another shape than the metadata say.
    """
    file = open_gguf(path)
    if EMBEDDING not in file.tensors or len(file.tensors[EMBEDDING].shape) != 2:
        raise InputError(f"{path}: it has no tensor {EMBEDDING!r} of two dimensions; it is not a language model")
    factors = file.read(ROPE_FACTORS) if ROPE_FACTORS in file.tensors else None
    vocab = file.tensors[EMBEDDING].shape[0]
    architecture, config = read_config(
        file.metadata, vocab=vocab, tied="output.weight" not in file.tensors, factors=factors
    )
    entries = list_entries(architecture, config)
    try:
        check_names(entries, file.tensors.keys() - {ROPE_FACTORS})
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    shapes = {name: param.get_value().shape for name, param in named_weights(abstract_transformer(config)).items()}
    for entry in entries:
        found, wanted = file.tensors[entry.name].shape, entry.shape(shapes[entry.leaf])
        if found != wanted:
            raise InputError(f"{path}: tensor {entry.name!r} has shape {list(found)}, its metadata say {list(wanted)}")
    return GgufCheckpoint(
        file=file, architecture=architecture, config=config, tokenizer=read_tokenizer(file.metadata, vocab)
    )
