"""What is known of a model before its weights are read; runs are under test with the commands that read them."""

import shutil
from pathlib import Path

import pytest

from hsai.errors import InputError
from hsai.export import write_bundle
from hsai.export.source import inspect_model, open_model
from tests.export.tiny_models import make_config, make_model, make_tokenizer


def test_a_record_needs_no_weights(copy: Path) -> None:
    whole = open_model(copy)
    (copy / "weights.safetensors").unlink()
    record = inspect_model(copy)
    assert record.config == make_config() and record.directory == copy
    assert record.origin == {"recipe": "int4", "bits": 4.25}
    assert (whole.config, whole.origin, whole.sha256) == (record.config, record.origin, record.sha256)
    with pytest.raises(InputError, match="weights.safetensors is missing"):
        open_model(copy)


def test_the_checksum_is_that_of_weights_and_tokenizer(plain: Path, tmp_path: Path) -> None:
    write_bundle(tmp_path / "same", make_model("int4"), make_tokenizer(), extra={"anything": "else"})
    write_bundle(tmp_path / "other", make_model("int8"), make_tokenizer())
    digests = [inspect_model(path).sha256 for path in (plain, tmp_path / "same", tmp_path / "other")]
    assert digests[0] == digests[1] != digests[2] and len(digests[0]) == 64


@pytest.mark.parametrize("read", [inspect_model, open_model])
def test_what_is_no_model(read, copy: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere does not exist; give a training run, a bundle, a checkpoint or"):
        read(tmp_path / "nowhere")
    shutil.rmtree(copy)
    copy.mkdir()
    with pytest.raises(InputError, match="holds neither checkpoints nor a manifest.json"):
        read(copy)
    (copy / "checkpoints").mkdir()
    with pytest.raises(InputError, match="no checkpoint in .*checkpoints; there are: none"):
        read(copy)
