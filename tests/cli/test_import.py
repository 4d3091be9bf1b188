"""`hsai import` and `hsai export --to huggingface`: a run of ours out, a checkpoint of others in, and back again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from hsai.cli import main
from hsai.export.bundle import read_bundle
from hsai.export.source import inspect_model, open_model
from hsai.formats.storage import named_arrays
from hsai.infer import Engine
from hsai.sharding import MeshConfig, make_mesh
from tests.cli.conftest import Workshop

Refuse = Callable[..., str]
PROMPTS = ("def main():", "import ", "")


@pytest.fixture(scope="session")
def checkpoint(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as a checkpoint, in several files, with a chat template; not to be changed."""
    directory = tmp_path_factory.mktemp("checkpoint") / "tiny"
    words = ["export", str(workshop.run), "--to", "huggingface", "--out", str(directory), "--shard-size", "500KB"]
    assert main(words) == 0
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return directory


@pytest.fixture(scope="session")
def imported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint as a bundle again; not to be changed."""
    directory = tmp_path_factory.mktemp("imported") / "tiny"
    assert main(["import", str(checkpoint), str(directory)]) == 0
    return directory


def test_a_run_generates_the_same_tokens_in_transformers(workshop: Workshop, checkpoint: Path) -> None:
    source = open_model(workshop.run)
    engine = Engine.trace(source.model, source.tokenizer)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    assert model.config.eos_token_id == tokenizer.eos_token_id == source.tokenizer.eot
    assert len(list(checkpoint.glob("*.safetensors"))) > 1
    for prompt in PROMPTS:
        ids = [source.tokenizer.eot, *source.tokenizer.encode(prompt)]
        assert tokenizer(prompt).input_ids == ids
        assert tokenizer(prompt, add_special_tokens=False).input_ids == ids[1:]
        ours = engine.generate_tokens(ids, max_tokens=24).tokens
        theirs = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :]
        assert list(ours) == [token for token in theirs.tolist() if token != source.tokenizer.eot], prompt
        assert len(ours) > 4


def test_what_comes_back_is_what_went_out(workshop: Workshop, checkpoint: Path, imported: Path) -> None:
    source, bundle = open_model(workshop.run), read_bundle(imported)
    assert bundle.config == source.config
    for name, array in named_arrays(source.model).items():
        found = named_arrays(bundle.model)[name]
        assert found.dtype == array.dtype and np.array_equal(found, array), name
    assert bundle.tokenizer.equals(source.tokenizer) and source.tokenizer.prefix == (source.tokenizer.eot,)
    assert bundle.manifest.extra["architecture"] == "LlamaForCausalLM"


def test_what_lies_beside_the_weights_travels(checkpoint: Path, imported: Path, place: Path) -> None:
    assert main(["export", str(imported), "--to", "huggingface", "--out", "out", "--shard-size", "500KB"]) == 0
    before, after = ({path.name: path.read_bytes() for path in at.iterdir()} for at in (checkpoint, place / "out"))
    assert {"chat_template.jinja", "tokenizer_config.json", "tokenizer.json", "config.json"} <= before.keys()
    assert before == after


def test_a_checkpoint_is_a_model_like_any_other(
    workshop: Workshop, checkpoint: Path, imported: Path, place: Path
) -> None:
    """Evaluated beside the bundle that was made of it."""
    words = ["eval", str(checkpoint), str(imported), "--corpus", str(workshop.corpus), "--tokens", "1000"]
    assert main([*words, "--json", "rows.json"]) == 0
    foreign, ours = json.loads(Path("rows.json").read_text())["rows"]
    assert foreign["heldout_loss"] == ours["heldout_loss"] < 6.2  # below that of 512 equal chances
    assert foreign["parameters"] == ours["parameters"] > 300_000


def test_a_checkpoint_is_read_onto_a_mesh(checkpoint: Path, imported: Path, place: Path, refuse: Refuse) -> None:
    """Each device gets its part, and the numbers are those of one device."""
    (place / "code.txt").write_text("def main(argv: list[str]) -> int:\n    return len(argv)\n" * 30)
    split = open_model(checkpoint, mesh=make_mesh(MeshConfig(data=2, fsdp=2, model=2))).model
    gate = split.layers.mlp.gate[...]
    assert {shard.data.size for shard in gate.addressable_shards} == {gate.size // 4}
    assert np.array_equal(gate, open_model(imported).model.layers.mlp.gate[...])
    values = []
    for model, words in ((checkpoint, ("--mesh", "2x2x2")), (imported, ())):
        tasks = ("--tasks", "perplexity:code.txt", "--window", "32", "--json", "result.json")
        assert main(["eval", str(model), *tasks, *words]) == 0
        (found,) = json.loads(Path("result.json").read_text())["evaluations"]
        values.append(found["tasks"][0]["metrics"]["perplexity"]["value"])
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    refuse("eval", checkpoint, "--tasks", "perplexity:code.txt", "--mesh", "1x1x8", names=("mesh.model=8",))


def test_a_checkpoint_answers_as_its_bundle_does(
    checkpoint: Path, imported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for model in (checkpoint, imported):
        capsys.readouterr()
        assert main(["generate", str(model), "def ", "--chat", "--prefill", "main(", "--max-tokens", "12"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and said[0].startswith("main(") and len(said[0]) > 10


def test_weights_are_rounded_only_if_asked(checkpoint: Path, place: Path, refuse: Refuse) -> None:
    assert main(["import", str(checkpoint), "half", "--dtype", "bfloat16"]) == 0
    model = read_bundle("half").model
    exact = named_arrays(open_model(checkpoint).model)
    for name, array in named_arrays(model).items():
        assert array.dtype == "bfloat16" and np.array_equal(array, exact[name].astype("bfloat16")), name
    refuse("import", "half", "again", names=("half is no foreign model", "hsai export"))


def test_packed_weights_go_out_dense_or_not_at_all(workshop: Workshop, place: Path, refuse: Refuse) -> None:
    model = str(workshop.compressed / "int8")
    refuse("export", model, "--to", "huggingface", "--out", "out", names=("packed as int8", "dequantize"))
    assert main(["export", model, "--to", "huggingface", "--out", "out", "--dequantize", "--dtype", "bfloat16"]) == 0
    assert inspect_model("out").config.embed == 128
    assert transformers.AutoModelForCausalLM.from_pretrained("out").dtype == torch.bfloat16


def test_a_bundle_is_kept_while_the_checkpoint_is_the_same(
    checkpoint: Path, imported: Path, place: Path, refuse: Refuse, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(imported, "bundle")
    refuse("import", checkpoint, "bundle", names=("bundle exists", "another OUT, or --overwrite"))
    assert main(["import", str(checkpoint), "bundle", "--reuse"]) == 0
    assert "reusing bundle" in capsys.readouterr().out
    refuse("import", checkpoint, "bundle", "--reuse", "--dtype", "bfloat16", names=("its dtype is another",))
    assert main(["import", str(checkpoint), "bundle", "--overwrite", "--dtype", "bfloat16"]) == 0
    assert named_arrays(read_bundle("bundle").model)["embed"].dtype == "bfloat16"


def test_a_damaged_checkpoint_leaves_nothing(checkpoint: Path, place: Path, refuse: Refuse) -> None:
    copy = Path(shutil.copytree(checkpoint, "copy"))
    file = sorted(copy.glob("*.safetensors"))[1]
    content = file.read_bytes()
    file.write_bytes(content[:-9])
    refuse("import", copy, "a/b", names=(file.name, "truncated"))
    file.write_bytes(content[:-4] + np.float32(np.nan).tobytes())
    refuse("import", copy, "a/b", names=("copy: tensor 'model.layers.", "1 values that are NaN or infinite"))
    file.unlink()
    refuse("import", copy, "a/b", names=(file.name, "not in the directory"))
    (copy / "tokenizer.json").unlink()
    refuse("import", copy, "a/b", names=(file.name,))


def test_a_vocabulary_beyond_the_embedding_is_refused_by_all(
    workshop: Workshop, checkpoint: Path, place: Path, refuse: Refuse
) -> None:
    """Ids without a row would read whatever jax makes of them."""
    copy = Path(shutil.copytree(checkpoint, "copy"))
    backend = tokenizers.Tokenizer.from_file(str(copy / "tokenizer.json"))
    backend.add_tokens([f"extra{number}" for number in range(9)])
    backend.save(str(copy / "tokenizer.json"))
    names = ("copy: the tokenizer has 521 tokens, more than model.vocab=512",)
    refuse("import", copy, "o", names=names)
    refuse("generate", copy, "x", names=names)
    refuse("eval", copy, "--corpus", workshop.corpus, names=names)
    refuse("export", copy, "--out", "o", names=names)


def test_what_is_asked_for_has_an_effect_or_is_refused(workshop: Workshop, checkpoint: Path, refuse: Refuse) -> None:
    run = workshop.run
    refuse("export", run, "--out", "o", "--shard-size", "5GB", names=("--shard-size is for --to huggingface",))
    refuse("export", run, "--out", "o", "--dequantize", names=("--dequantize is for --to huggingface",))
    to = ("--to", "huggingface", "--out", "o")
    refuse("export", run, *to, "--prefill-buckets", "8", names=("--prefill-buckets is for --to bundle",))
    refuse("export", run, *to, "--reuse", names=("--reuse is for --to bundle",))
    for size in ("0MB", "5", "5 GB", "-1GB", "1.5GB"):
        refuse("export", run, *to, f"--shard-size={size}", names=(f"--shard-size {size} is no size", "500MB"))
    refuse("export", run, "--out", "o", "--to", "onnx", names=("onnx", "bundle", "huggingface"))
    refuse("import", "nowhere", "o", names=("nowhere does not exist",))
    refuse("export", run, "--to", "huggingface", "--out", workshop.bundles, "--overwrite", names=("config.json",))
