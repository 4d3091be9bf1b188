"""Chat template, configs, prefix and stop tokens travel in bundles, and are as safe there as weights."""

from pathlib import Path

import pytest

from hsai.data.tokenizer import Tokenizer
from hsai.errors import InputError
from hsai.export import read_bundle, write_bundle
from hsai.export.source import inspect_model, open_model
from tests.export.manifests import edit
from tests.export.tiny_models import CHATTY_ASSETS, make_chatty_tokenizer, make_model


@pytest.fixture(scope="module")
def chatty() -> Tokenizer:
    return make_chatty_tokenizer()


@pytest.fixture
def bundle(chatty: Tokenizer, tmp_path: Path) -> Path:
    write_bundle(tmp_path / "b", make_model("int4"), chatty, assets=CHATTY_ASSETS)
    return tmp_path / "b"


def test_assets_and_roles_are_read_back(bundle: Path, chatty: Tokenizer, tmp_path: Path) -> None:
    read = read_bundle(bundle)
    assert read.assets == CHATTY_ASSETS and set(CHATTY_ASSETS) < set(read.manifest.files)
    assert (read.tokenizer.eot, read.tokenizer.prefix, read.tokenizer.stops) == (
        chatty.eot,
        chatty.prefix,
        chatty.stops,
    )
    source = open_model(bundle)
    write_bundle(tmp_path / "again", source.model, source.tokenizer, assets=source.assets)
    assert read_bundle(tmp_path / "again").assets == CHATTY_ASSETS
    assert inspect_model(tmp_path / "again").sha256 == inspect_model(bundle).sha256


def test_other_assets_make_another_model(bundle: Path, chatty: Tokenizer, tmp_path: Path) -> None:
    write_bundle(tmp_path / "bare", make_model("int4"), chatty)
    assert read_bundle(tmp_path / "bare").assets == {}
    assert inspect_model(tmp_path / "bare").sha256 != inspect_model(bundle).sha256


@pytest.mark.parametrize("name", CHATTY_ASSETS)
def test_altered_and_unlisted_assets_are_not_believed(name: str, bundle: Path) -> None:
    path = bundle / name
    content = path.read_bytes()
    path.write_bytes(content.replace(b"e", b"E", 1))
    with pytest.raises(InputError, match=f"{name} is altered"):
        read_bundle(bundle)
    path.write_bytes(content)
    edit(bundle / "manifest.json", lambda manifest: manifest["files"].pop(name))
    assert name not in read_bundle(bundle).assets and len(read_bundle(bundle).assets) == 2


def test_manifests_from_before_there_were_roles(bundle: Path, chatty: Tokenizer) -> None:
    def forget(manifest: dict) -> None:
        del manifest["tokenizer"]["prefix"], manifest["tokenizer"]["stops"]

    edit(bundle / "manifest.json", forget)
    read = read_bundle(bundle).tokenizer
    assert read.prefix == (chatty.eot,) and read.stops == {chatty.eot}


def test_roles_that_the_tokenizer_lacks(bundle: Path) -> None:
    edit(bundle / "manifest.json", lambda manifest: manifest["tokenizer"].update(stops=["<|none|>"]))
    with pytest.raises(InputError, match="has no token '<|none|>'".replace("|", r"\|")):
        read_bundle(bundle)
