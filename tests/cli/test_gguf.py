"""A GGUF file through the commands: in, out, and run as it is."""

from pathlib import Path

import numpy as np
import pytest

from hsai.cli import main
from hsai.export.source import inspect_model, open_model
from hsai.interop.gguf import open_gguf_checkpoint
from hsai.interop.gguf_container import open_gguf
from hsai.interop.gguf_write import write_gguf
from tests.interop.gguf_files import CONFIGS, random_model, train_tokenizer


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf", random_model(CONFIGS["llama"]), train_tokenizer(), dtype="q8_0")
    return tmp_path / "tiny.gguf"


def test_in_and_out(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, again = tmp_path / "bundle", tmp_path / "made" / "again.gguf"
    assert main(["import", str(file), str(bundle)]) == 0
    assert inspect_model(bundle).config == inspect_model(file).config
    assert main(["export", str(bundle), "--to", "gguf", "--gguf-type", "f32", "--out", str(again)]) == 0
    assert "a llama" in capsys.readouterr().out
    before, after = open_gguf(file), open_gguf(again)
    assert before.tensors.keys() == after.tensors.keys()
    for name in before.tensors:
        assert np.array_equal(before.read(name), after.read(name)), name
    wanted, found = open_gguf_checkpoint(file).tokenizer, open_gguf_checkpoint(again).tokenizer
    assert found.backend.to_str() == wanted.backend.to_str()
    assert (found.bos, found.eos, found.stops, found.add_bos) == (wanted.bos, wanted.eos, wanted.stops, wanted.add_bos)
    assert main(["export", str(bundle), "--to", "gguf", "--out", str(again)]) == 2
    assert "exists; give another --out, or --overwrite" in capsys.readouterr().err
    assert main(["export", str(bundle), "--to", "gguf", "--out", str(again), "--overwrite"]) == 0
    assert open_gguf(again).tensors["blk.0.attn_q.weight"].type.name == "F16"


def test_generates_from_the_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(file), "the quick", "--max-tokens", "3"]) == 0
    text = capsys.readouterr().out
    source = open_model(file)
    assert text.startswith("the quick") and source.tokenizer.prefix == (0,)
    assert main(["generate", str(file), "the quick", "--graphs"]) == 2
    assert "is a GGUF file, which has none" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["import", "FILE", "OUT"], ["generate", "FILE", "x"], ["eval", "FILE"]])
def test_a_damaged_file_is_one_line_and_leaves_nothing(
    command: list[str], file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_bytes(file.read_bytes()[:-1000])
    before = sorted(tmp_path.iterdir())
    words = [{"FILE": str(file), "OUT": str(tmp_path / "out")}.get(word, word) for word in command]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "is truncated" in error and error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_options_are_for_what_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main(["export", "m", "--to", "huggingface", "--gguf-type", "f32", "--out", out]) == 2
    assert "--gguf-type is for --to gguf, and this is --to huggingface" in capsys.readouterr().err
    assert main(["export", "m", "--dequantize", "--out", out]) == 2
    assert "--dequantize is for --to huggingface or gguf, and this is --to bundle" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "none.gguf"), "--out", out]) == 2
    assert "No such file" in capsys.readouterr().err
