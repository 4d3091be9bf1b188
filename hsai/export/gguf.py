"""A model that was opened, as a GGUF file: with its tokenizer, its chat template, and its name."""

from pathlib import Path

from hsai.export.source import ModelSource
from hsai.interop.assemble import Progress
from hsai.interop.gguf_assets import gather_tokenizer
from hsai.interop.gguf_write import GgufRecord, GgufType, write_gguf


def export_gguf(
    path: Path,
    source: ModelSource,
    *,
    dtype: GgufType = "f16",
    dequantize: bool = False,
    progress: Progress | None = None,
) -> GgufRecord:
    """Writes a model and its tokenizer; arguments, result and refusals as of `write_gguf`."""
    return write_gguf(
        path,
        source.model,
        gather_tokenizer(source.tokenizer, source.assets),
        dtype=dtype,
        dequantize=dequantize,
        about={"name": source.directory.resolve().stem} | source.origin.get("about", {}),
        progress=progress,
    )
