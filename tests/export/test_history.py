"""What a bundle inherits from the model that it is made of, and what it tells of that model's past."""

import copy
from pathlib import Path
from typing import Any

from hsai.export.history import SUMS, list_steps, pass_on, tell_history
from hsai.export.source import ModelRecord
from tests.export.tiny_models import make_config

RUN: dict[str, Any] = {"run": "quickstart", "step": 1200, "corpus": "/data", "sequence_length": 64, "training": {}}
SUMMED = {"parameters": 10, "bytes": 5, "bits_per_weight": 4.0}
MADE: dict[str, Any] = {
    "source_sha256": "aa",
    "recipe": {"calibration": {"tokens": 64}},
    "recipe_name": "joint_nm24",
    "calibration_sha256": "ff",
    "ledger": {"weights": [{}, {}], "layers": [{}], **SUMMED},
    "cost": {"seconds": 1812.5, "machine": {"cores": 2}},
    "command": "hsai compress",
    "commit": "abc",
}


def record(origin: dict[str, Any], name: str = "first", sha256: str = "bb") -> ModelRecord:
    return ModelRecord(directory=Path("/models") / name, config=make_config(), origin=origin, sha256=sha256)


def test_how_a_bundle_was_made_is_the_past_of_what_is_made_of_it() -> None:
    origin = RUN | MADE
    kept = copy.deepcopy(origin)
    passed = pass_on(record(origin))
    assert origin == kept
    entry = passed.pop("made_of")
    assert passed == RUN
    assert entry == {"directory": "/models/first", "sha256": "bb", "origin": MADE | {"ledger": SUMMED}}
    assert set(SUMMED) == set(SUMS)
    # And of a third one both are.
    again = pass_on(record(RUN | {"recipe_name": "nm24_int4", "made_of": entry}, "second", "cc"))
    assert again["made_of"]["origin"] == {"recipe_name": "nm24_int4", "made_of": entry}
    assert [step.get("recipe_name") for step in list_steps(again)] == [None, "nm24_int4", "joint_nm24"]


def test_a_model_that_no_command_made_has_no_past() -> None:
    assert pass_on(record(RUN)) == RUN and pass_on(record({})) == {}
    assert tell_history({}) == {} and tell_history(RUN) == {"training steps": "1,200"}
    assert list(list_steps(RUN)) == [RUN]


def test_a_recovered_bundle_tells_its_teacher_and_its_beginning() -> None:
    """Down to the calibration that its masks come from; a teacher's own steps are not among the model's."""
    compressed = {"directory": "/models/nm24", "sha256": "bb", "origin": RUN | MADE}
    teacher = {"directory": "/models/dense", "sha256": "dd", "origin": {"checkpoint": "dense.gguf"}}
    origin = {"run": "recover", "step": 400, "sources": {"teacher": teacher, "initialize_from": compressed}}
    assert tell_history(origin) == {
        "training steps": "400",
        "teacher": "dense (SHA-256 dd)",
        "began from": (
            "nm24 (SHA-256 bb, recipe joint_nm24, calibration SHA-256 ff, made in 1,812.5 s, training steps 1,200)"
        ),
    }
    assert [step.get("calibration_sha256") for step in list_steps(origin)] == [None, "ff"]
    repacked = pass_on(record(origin | {"recipe_name": "nm24_int4", "cost": {"seconds": 3}}, "recovered"))
    told = tell_history(repacked)
    assert told["made of"] == "recovered (SHA-256 bb, recipe nm24_int4, made in 3 s)"
    assert {name: told[name] for name in ("teacher", "began from")} == {
        name: text for name, text in tell_history(origin).items() if name != "training steps"
    }
