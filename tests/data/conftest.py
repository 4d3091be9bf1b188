"""A small folder of text, and corpora made from it."""

import random
from pathlib import Path

import pytest

from hsai.data.corpus import Corpus, DataConfig, build_corpus

WORDS = "sparse dense wire pod phone prune scale bits gather héron 数据 tokens = ( ) :\n".split(" ")


def write_texts(directory: Path, count: int) -> Path:
    """`count` files of a few hundred words, the same on every call."""
    for index in range(count):
        draw = random.Random(index)
        path = directory / f"part{index % 3}" / f"text{index:03d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(" ".join(draw.choices(WORDS, k=draw.randrange(50, 400))), encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 text files; not to be changed by a test."""
    return write_texts(tmp_path_factory.mktemp("texts"), 40)


@pytest.fixture(scope="session")
def config(texts: Path) -> DataConfig:
    return DataConfig(source=str(texts), vocab_size=290, heldout_fraction=0.2, sequence_length=16)


@pytest.fixture(scope="session")
def corpus(config: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The corpus of `config`; not to be changed by a test."""
    return build_corpus(config, tmp_path_factory.mktemp("corpus") / "built")
