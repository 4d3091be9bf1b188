"""`hsai train` from a model that exists: what it takes over, what it remembers, and what it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hsai.cli import main
from hsai.cli.page import make_page
from hsai.export.bundle import read_bundle, write_bundle
from hsai.export.history import tell_history
from hsai.export.source import open_model
from hsai.formats import NMInt4, to_dense
from hsai.formats.storage import named_arrays, named_weights
from hsai.train.checkpoint import Checkpointer
from hsai.train.restore import read_run
from tests.cli.conftest import SHORT, TINY, Workshop
from tests.cli.test_page import Reader, make_results
from tests.export.tiny_models import CHATTY_ASSETS, make_chatty_tokenizer, make_model

Refuse = Callable[..., str]
STILL = ("--optim.learning-rate", "1e-12")


def begin_from(model: Path) -> tuple[str, ...]:
    return ("--data.vocab-size", "None", "--train.initialize-from", str(model))


def read_record(run: Path) -> dict:
    with Checkpointer(run / "checkpoints", None) as checkpointer:
        return checkpointer.read_record()


@pytest.mark.parametrize("kind", ["run", "int4"])
def test_a_run_begins_where_another_model_ended(kind: str, workshop: Workshop, place: Path) -> None:
    model = workshop.run if kind == "run" else workshop.bundles / kind
    assert main(["train", TINY, *SHORT, *STILL, *begin_from(model), "--directory", "on"]) == 0
    source, trained = open_model(model), read_run(Path("on"))
    found = named_arrays(trained.model)
    for name, param in named_weights(source.model).items():
        np.testing.assert_allclose(found[name], to_dense(param.get_value()), rtol=0, atol=1e-6, err_msg=name)
    assert trained.tokenizer.equals(source.tokenizer)
    assert (place / "on" / "tokenizer.json").read_text() == (workshop.run / "tokenizer.json").read_text()
    kept = read_record(Path("on"))["sources"]["initialize_from"]
    assert kept["sha256"] == source.sha256 and kept["directory"] == str(model.resolve())
    assert open_model(Path("on")).origin["sources"]["initialize_from"] == kept
    before = json.loads((workshop.run / "result.json").read_text())["heldout_bits_per_byte"]
    after = json.loads((place / "on" / "result.json").read_text())["heldout_bits_per_byte"]
    assert after == pytest.approx(before, rel=1e-6 if kind == "run" else 0.02)


def test_a_run_goes_on_without_the_model_it_began_from(workshop: Workshop, place: Path) -> None:
    shutil.copytree(workshop.bundles / "int4", "model")
    words = ["train", TINY, *SHORT, *begin_from(Path("model"))]
    assert main([*words, "--directory", "whole"]) == 0
    assert main([*words, "--directory", "cut"]) == 0
    shutil.rmtree(place / "cut" / "checkpoints" / "6")  # as if it had been killed after the fifth step
    (place / "cut" / "result.json").unlink()
    shutil.rmtree(place / "runs")  # the corpus too has to be built again
    shutil.rmtree("model")
    assert main([*words, "--directory", "cut"]) == 0
    whole, cut = (named_arrays(read_run(Path(name)).model) for name in ("whole", "cut"))
    assert all(np.array_equal(cut[name], array) for name, array in whole.items())
    assert read_record(Path("cut"))["sources"] == read_record(Path("whole"))["sources"]


def test_what_belongs_to_a_model_travels_with_it(place: Path) -> None:
    write_bundle("chatty", make_model(), make_chatty_tokenizer(), assets=CHATTY_ASSETS)
    shape = ("--model.heads", "4", "--model.kv-heads", "2", "--model.head-dim", "32")
    assert main(["train", TINY, *SHORT, *shape, *begin_from(Path("chatty")), "--directory", "on"]) == 0
    source = open_model("on")
    assert source.assets == CHATTY_ASSETS
    assert source.tokenizer.equals(make_chatty_tokenizer())
    (corpus,) = (place / "runs" / "data").iterdir()
    assert json.loads((corpus / "meta.json").read_text())["tokenizer"] == make_chatty_tokenizer().roles


def test_models_that_a_run_cannot_begin_from(workshop: Workshop, refuse: Refuse) -> None:
    int4 = workshop.bundles / "int4"
    from_int4 = begin_from(int4)
    refuse("train", TINY, *from_int4[:2], names=("data.vocab_size=None", "train.initialize_from"))
    refuse("train", TINY, *from_int4[2:], names=("data.vocab_size=512", str(int4), "set it to None"))
    refuse("train", TINY, *begin_from(Path("nowhere")), names=("train.initialize_from: nowhere does not exist",))
    refuse("train", TINY, *from_int4, "--model.mlp", "128", names=(str(int4), "change model.mlp: 128 -> 256"))
    other = ("--data-directory", workshop.corpus)
    names = ("data.vocab_size=512, not None",)
    refuse("train", TINY, *SHORT, *from_int4, *other, names=names, beside=(workshop.corpus,))


def test_a_corpus_of_another_models_tokens_is_refused(workshop: Workshop, place: Path, refuse: Refuse) -> None:
    write_bundle("chatty", make_model(), make_chatty_tokenizer())
    shape = ("--model.heads", "4", "--model.kv-heads", "2", "--model.head-dim", "32")
    words = ("train", TINY, *SHORT, "--data-directory", "corpus")
    assert main([*words, *begin_from(workshop.run), "--directory", "on"]) == 0
    names = ("corpus was built with the tokenizer of another model",)
    refuse(*words, *shape, *begin_from(Path("chatty")), "--directory", "other", names=names)


RECOVERY = """
from dataclasses import replace
from pathlib import Path
from configs import tiny
from hsai.formats import Int8Config, NMInt4Config
from hsai.train.distill import DistillConfig
from hsai.train.formats import FormatRule

def get_config():
    parent = tiny.get_config()
    blocks = FormatRule(pattern="layers.*", format=NMInt4Config(n=2, m=4, group=64), masks="fixed", scales="learned")
    train = replace(
        parent.train,
        initialize_from=Path("compressed"),
        distill=DistillConfig(teacher=Path("dense"), share=0.5, hidden=0.5),
        formats=(blocks, FormatRule(pattern="embed", format=Int8Config())),
    )
    return replace(parent, data=replace(parent.data, vocab_size=None), train=train)
"""


JOINT = """
from hsai.compress.calibration import CalibrationConfig
from hsai.compress.recipe import RecipeConfig, Rule
from hsai.compress.solvers import FeedbackConfig
from hsai.formats import Int8Config, NMInt4Config

def get_config():
    blocks = Rule(pattern="layers.*", format=NMInt4Config(n=2, m=4, group=64), solver=FeedbackConfig())
    return RecipeConfig(
        rules=(blocks, Rule(pattern="embed", format=Int8Config())),
        calibration=CalibrationConfig(tokens=512, sequence_length=64, batch=4),
    )
"""


def test_a_compressed_bundle_is_recovered_and_packed_again(
    workshop: Workshop, place: Path, refuse: Refuse, capsys: pytest.CaptureFixture[str]
) -> None:
    """From `compress` to `train` to `compress`: masks stay, nothing is lost, and the teacher is who it was. Of all that
    the last ledger tells: no error, and no calibration, but that of the first."""
    (place / "joint.py").write_text(JOINT)
    assert main(["compress", str(workshop.run), "--recipe", "joint.py", "--out", "one_shot"]) == 0
    (place / "configs").mkdir()
    shutil.copy(TINY, "configs")
    (place / "configs" / "recover.py").write_text(RECOVERY)
    models = ("--train.initialize-from", "one_shot", "--train.distill.teacher", workshop.run)
    words = ["train", "configs/recover.py", *SHORT, *map(str, models)]
    assert main([*words, "--directory", "recovered"]) == 0
    sources = read_record(Path("recovered"))["sources"]
    assert sources["teacher"]["sha256"] == open_model(workshop.run).sha256

    recovered, compressed = open_model("recovered").model, open_model("one_shot").model
    moved = 0
    for name, param in named_weights(compressed).items():
        before, after = param.get_value(), named_weights(recovered)[name].get_value()
        assert type(after) is type(before), name
        if isinstance(before, NMInt4):
            assert np.array_equal(after.kept(), before.kept()), name
            moved += not np.array_equal(after.dense(), before.dense())
    assert moved == 7
    capsys.readouterr()
    assert main(["compress", "recovered", "--recipe", "joint.py", "--out", "packed"]) == 0
    assert "note: recipe joint: all that it would solve is in its format already" in capsys.readouterr().out
    again = named_arrays(open_model("packed").model)
    assert all(np.array_equal(again[name], array) for name, array in named_arrays(recovered).items())

    first, last = (read_bundle(name).manifest.extra for name in ("one_shot", "packed"))
    errors = {row["weight"]: row["relative_error"] for row in last["ledger"]["weights"]}
    assert errors == {name: 0.0 if name.endswith(".gain") else None for name in errors}
    assert first["ledger"]["layers"] and "layers" not in last["ledger"]
    assert first["calibration_sha256"] and "calibration_sha256" not in last
    history = tell_history(last)
    assert history["training steps"] == "6" and f"SHA-256 {open_model(workshop.run).sha256}" in history["teacher"]
    assert history["began from"].startswith("one_shot (") and first["calibration_sha256"] in history["began from"]
    text = " ".join(Reader(make_page(make_results(last))).words)
    assert all(f"{name} {told}" in text for name, told in history.items())
    assert text.count("as it was") == 8 and "calibration tokens" not in text and "this step alone" in text
    assert main(["compress", "recovered", "--recipe", "joint.py", "--out", "packed", "--reuse"]) == 0
    assert "reusing packed" in capsys.readouterr().out

    # With another teacher the rest of the run would be another run.
    shutil.rmtree(place / "recovered" / "checkpoints" / "6")
    other = ("--train.distill.teacher", str(workshop.bundles / "bf16"))
    names = ("recovered was trained with another teacher", "bf16")
    refuse(*words, *other, "--directory", "recovered", names=names)
    refuse(
        *words, "--train.distill.teacher", "nowhere", "--directory", "new", names=("train.distill.teacher: nowhere",)
    )
