"""A tokenizer, and one bundle of each kind to read; tests that change a bundle copy it first."""

import shutil
from pathlib import Path

import pytest

from hsai.data.tokenizer import Tokenizer
from hsai.export import write_bundle
from tests.export.tiny_models import make_model, make_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """An int4 bundle without graphs; not to be changed."""
    directory = tmp_path_factory.mktemp("plain") / "int4"
    write_bundle(directory, make_model("int4"), tokenizer, extra={"recipe": "int4", "bits": 4.25})
    return directory


@pytest.fixture
def copy(plain: Path, tmp_path: Path) -> Path:
    """The plain bundle, for a test to damage; the only thing in its directory."""
    return Path(shutil.copytree(plain, tmp_path / "copy"))
