"""A foreign model streamed into a bundle: the same bundle, file for file, as of the model in memory."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from hsai.data.tokenizer import Tokenizer
from hsai.errors import InputError
from hsai.export.bundle import import_bundle, read_bundle, write_bundle
from hsai.formats.storage import named_arrays, named_weights, replace_weights
from hsai.interop.assemble import assemble
from hsai.interop.huggingface import open_checkpoint, write_huggingface
from hsai.models import MoEConfig
from tests.export.tiny_models import make_model, snapshot

KINDS: dict[str, dict[str, Any]] = {
    "tied": {},
    "experts": {"moe": MoEConfig(experts=3, active=2), "tie_embeddings": False},
    "biases": {"qkv_bias": True, "layers": 1},
}


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_bundle_of_the_model(kind: str, dtype: str | None, tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_huggingface(tmp_path / "checkpoint", make_model(**KINDS[kind]), shard_bytes=200_000)
    source = open_checkpoint(tmp_path / "checkpoint")
    beside: dict[str, Any] = {"extra": {"from": "elsewhere"}, "assets": {"chat_template.jinja": b"{{ 1 }}"}}
    seen: list[tuple[int, int]] = []
    streamed = import_bundle(
        tmp_path / "streamed",
        source,
        tokenizer,
        dtype=dtype,
        progress=lambda done, total: seen.append((done, total)),
        **beside,
    )
    whole = assemble(source, dtype=dtype)
    assert write_bundle(tmp_path / "whole", whole, tokenizer, **beside) == streamed
    assert snapshot(tmp_path / "streamed") == snapshot(tmp_path / "whole")
    assert seen[-1] == (len(source.tensors), len(source.tensors))
    found = named_arrays(read_bundle(tmp_path / "streamed").model)
    for name, array in named_arrays(make_model(**KINDS[kind])).items():
        assert np.array_equal(found[name], array.astype(dtype or jnp.float32)), name


def test_a_number_that_is_none_leaves_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """In the last tensor that is read, when all others are written."""
    model = make_model(tie_embeddings=False)
    last = list(named_weights(model))[-1]
    bad = np.array(named_weights(model)[last].get_value())
    bad.reshape(-1)[-1] = np.nan
    write_huggingface(tmp_path / "checkpoint", replace_weights(model, {last: jnp.asarray(bad)}))
    with pytest.raises(InputError, match="checkpoint: tensor '.*' holds 1 values that are NaN or infinite"):
        import_bundle(tmp_path / "bundle", open_checkpoint(tmp_path / "checkpoint"), tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_vocabulary_that_is_too_large_is_refused_first(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_huggingface(tmp_path / "checkpoint", make_model(vocab=256))
    with pytest.raises(InputError, match="the tokenizer has 280 tokens, more than model.vocab=256"):
        import_bundle(tmp_path / "bundle", open_checkpoint(tmp_path / "checkpoint"), tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
