"""A tokenizer, and bundles with graphs in every format; not to be changed by a test."""

from pathlib import Path

import pytest

from hsai.data.tokenizer import Tokenizer
from hsai.export import GraphConfig, write_bundle
from hsai.infer import Engine
from tests.export.tiny_models import FORMATS, make_model, make_tokenizer

BUCKETS = (4, 16)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> dict[str, Path]:
    """A bundle of each format, with prefill graphs for 4 and 16 tokens."""
    directory = tmp_path_factory.mktemp("bundles")
    for name in FORMATS:
        write_bundle(directory / name, make_model(name), tokenizer, graphs=GraphConfig(prefill_buckets=BUCKETS))
    return {name: directory / name for name in FORMATS}


@pytest.fixture(scope="session")
def engine(bundles: dict[str, Path]) -> Engine:
    """Of the dense model, with a context of 48."""
    return Engine.load(bundles["dense"])
