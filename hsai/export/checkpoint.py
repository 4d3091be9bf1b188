"""A model that was opened, as a checkpoint of `transformers`: with its tokenizer and all that came with it."""

from pathlib import Path

from hsai.data.assets import TOKENIZER_CONFIG
from hsai.export.source import ModelSource
from hsai.interop.assemble import Progress
from hsai.interop.assets import TOKENIZER, describe_tokenizer, name_tokens, serialize_tokenizer
from hsai.interop.families import Family
from hsai.interop.huggingface import SHARD_BYTES, write_huggingface


def export_checkpoint(
    directory: Path,
    source: ModelSource,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    dequantize: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Family:
    """Writes a model and its tokenizer as a checkpoint; arguments, result and refusals as of `write_huggingface`.

    A model that came from a checkpoint goes back as the architecture, and with the special tokens, that it had; of any
    other, the tokenizer says which they are.
    """
    tokenizer, length = source.tokenizer, source.config.max_length
    assets = {TOKENIZER: serialize_tokenizer(tokenizer), TOKENIZER_CONFIG: describe_tokenizer(tokenizer, length)}
    return write_huggingface(
        directory,
        source.model,
        dtype=dtype,
        shard_bytes=shard_bytes,
        architecture=source.origin.get("architecture"),
        tokens=source.origin.get("special_tokens", name_tokens(tokenizer)),
        dequantize=dequantize,
        assets=assets | source.assets,
        overwrite=overwrite,
        progress=progress,
    )
