"""Any config tree survives the way to JSON and back, and what is not a config is refused with its path."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsai.configuration import difference, from_dict, suggest, to_dict, to_json
from hsai.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int4:
    format: Literal["int4"] = "int4"
    group: int = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class NM:
    format: Literal["nm"] = "nm"
    n: int
    m: int = 4

    def __post_init__(self) -> None:
        if self.n > self.m:
            raise ValueError(f"n={self.n} must be at most\n m={self.m}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    pattern: str
    weight: Int4 | NM | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optim:
    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = 1.0
    kind: Literal["adamw", "muon", 3, True] = "adamw"
    nesterov: bool = False

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise InputError(f"learning_rate={self.learning_rate} must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    steps: int | Literal["all"]
    optim: Optim = Optim()
    rules: tuple[Rule, ...] = ()
    axes: tuple[tuple[str, str | None], ...] = ()
    weight: "Int4 | NM" = Int4()
    data: Path | None = None
    seed: int | float = 0

    def __post_init__(self) -> None:
        if self.seed == 13:
            raise ValueError("optim.seed 13 is unlucky")


FLOATS = st.floats(allow_nan=False)
FORMATS = st.builds(Int4, group=st.integers()) | st.integers(4, 9).flatmap(
    lambda m: st.builds(NM, n=st.integers(0, m), m=st.just(m))
)
RUNS = st.builds(
    Run,
    steps=st.integers() | st.just("all"),
    optim=st.builds(
        Optim,
        learning_rate=st.floats(min_value=0, exclude_min=True),
        betas=st.tuples(FLOATS, FLOATS),
        clip=st.none() | FLOATS,
        kind=st.sampled_from(["adamw", "muon", 3, True]),
        nesterov=st.booleans(),
    ),
    rules=st.lists(st.builds(Rule, pattern=st.text(), weight=st.none() | FORMATS), max_size=3).map(tuple),
    axes=st.lists(st.tuples(st.text(), st.none() | st.text()), max_size=3).map(tuple),
    weight=FORMATS,
    data=st.none() | st.sampled_from([Path("a/b"), Path("/x")]),
    seed=st.integers().filter(lambda seed: seed != 13) | FLOATS.filter(lambda seed: seed != 13),
)


@settings(deadline=None)
@given(run=RUNS)
def test_round_trip_is_exact(run: Run) -> None:
    text = to_json(run)
    back = from_dict(Run, json.loads(text))
    assert back == run and hash(back) == hash(run)
    assert repr(back) == repr(run)  # the types too: 1, 1.0 and True are equal
    assert to_json(back) == text
    assert difference(back, run) == []


def test_json_is_valid_and_in_declaration_order() -> None:
    text = to_json(Optim(learning_rate=math.inf, clip=None))
    expected = """{
  "learning_rate": "inf",
  "betas": [
    0.9,
    0.95
  ],
  "clip": null,
  "kind": "adamw",
  "nesterov": false
}
"""
    assert text == expected


def test_absent_keys_take_their_defaults() -> None:
    assert from_dict(Run, {"steps": 3, "optim": {"clip": 2}}) == Run(steps=3, optim=Optim(clip=2.0))
    assert type(from_dict(Run, {"steps": 3, "optim": {"clip": 2}}).optim.clip) is float
    assert from_dict(Run, {"steps": 3, "weight": {"format": "nm", "n": 1}}).weight == NM(n=1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "steps is missing; expected int or 'all'"),
        ({"steps": 1, "optm": {}}, "optm: Run has no field 'optm'; did you mean optim?"),
        (
            {"steps": 1, "optim": {"learning_rat": 1}},
            "optim.learning_rat: Optim has no field 'learning_rat'; did you mean learning_rate?",
        ),
        (
            {"steps": 1, "weight": {"format": "int4", "zzz": 1}},
            "weight.zzz: Int4 has no field 'zzz'; valid: format, group",
        ),
        ({"steps": "1"}, "steps: expected int or 'all', got '1'"),
        ({"steps": True}, "steps: expected int or 'all', got True"),
        ({"steps": 1.0}, "steps: expected int or 'all', got 1.0"),
        (
            {"steps": 1, "optim": {"learning_rate": "fast"}},
            "optim.learning_rate: expected float, got 'fast'",
        ),
        ({"steps": 1, "optim": {"learning_rate": True}}, "optim.learning_rate: expected float, got True"),
        ({"steps": 1, "optim": {"nesterov": 1}}, "optim.nesterov: expected bool, got 1"),
        ({"steps": 1, "optim": {"clip": "1"}}, "optim.clip: expected float or None, got '1'"),
        ({"steps": 1, "optim": {"kind": 1}}, "optim.kind: expected 'adamw' or 'muon' or 3 or True, got 1"),
        ({"steps": 1, "optim": {"betas": [1]}}, "optim.betas: expected tuple of (float, float), got [1]"),
        ({"steps": 1, "optim": {"betas": "12"}}, "optim.betas: expected tuple of (float, float), got '12'"),
        ({"steps": 1, "optim": {"betas": [1, "2"]}}, "optim.betas.1: expected float, got '2'"),
        ({"steps": 1, "optim": 5}, "optim: expected Optim, got 5"),
        ({"steps": 1, "rules": [{"pattern": 5}]}, "rules.0.pattern: expected str, got 5"),
        ({"steps": 1, "rules": [{}]}, "rules.0.pattern is missing; expected str"),
        ({"steps": 1, "axes": [["a", 1]]}, "axes.0.1: expected str or None, got 1"),
        ({"steps": 1, "data": 5}, "data: expected Path or None, got 5"),
        ({"steps": 1, "weight": None}, "weight: expected Int4 or NM, got None"),
        ({"steps": 1, "weight": {"group": 64}}, "weight.format is missing; valid: int4, nm"),
        ({"steps": 1, "weight": {"format": "int5"}}, "weight.format: 'int5' is unknown; did you mean int4?"),
        ({"steps": 1, "weight": {"format": "nm", "n": 9}}, "weight: n=9 must be at most m=4"),
        ({"steps": 1, "optim": {"learning_rate": -1}}, "optim: learning_rate=-1.0 must be positive"),
        ({"steps": 1, "seed": 13}, "optim.seed 13 is unlucky"),
        ([1], "config: expected Run, got [1]"),
        ({"steps": "x" * 200}, f"steps: expected int or 'all', got '{'x' * 76}..."),
    ],
)
def test_what_is_no_config_is_refused_in_one_line(data: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        from_dict(Run, data)
    assert str(caught.value) == message


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    data: int = 1

    def __post_init__(self) -> None:
        if self.data == 0:
            raise InputError("mesh.data=0 must be positive")
        if self.data < 0:
            raise InputError("meshes must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pod:
    mesh: Mesh = Mesh()


def test_a_path_is_not_said_twice() -> None:
    with pytest.raises(InputError, match=r"^mesh\.data=0 must be positive$"):
        from_dict(Pod, {"mesh": {"data": 0}})
    with pytest.raises(InputError, match=r"^mesh: meshes must be positive$"):
        from_dict(Pod, {"mesh": {"data": -1}})


@pytest.mark.parametrize("value", [[1.0], math.nan, {"a": 1}, object(), Optim])
def test_what_a_config_cannot_hold_is_named(value: Any) -> None:
    with pytest.raises(InputError, match=r"^optim\.clip: .* is (NaN|of type \w+); a config holds None, bool, int"):
        to_dict(Run(steps=1, optim=Optim(clip=value)))


def test_an_unsupported_field_type_is_a_defect() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Bad:
        names: dict[str, int]

    with pytest.raises(TypeError, match="names: no config can have a field of type"):
        from_dict(Bad, {"names": {}})


def test_a_union_that_cannot_be_told_apart_is_a_defect() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Bad:
        either: Optim | Run

    with pytest.raises(TypeError, match="no Literal field tells Optim, Run apart"):
        from_dict(Bad, {"either": {"steps": 1}})


def test_difference_names_each_changed_field() -> None:
    parent = Run(steps=10, rules=(Rule(pattern="a", weight=Int4()), Rule(pattern="b")))
    assert difference(dataclasses.replace(parent, optim=Optim(learning_rate=1e-3)), parent) == [
        "optim.learning_rate: 0.0003 -> 0.001"
    ]
    fork = dataclasses.replace(
        parent,
        steps="all",
        optim=dataclasses.replace(parent.optim, betas=(0.9, 0.99), kind="muon"),
        weight=NM(n=2),
        rules=(Rule(pattern="a", weight=Int4(group=32)),),
        axes=(("embed", None),),
    )
    assert difference(fork, parent) == [
        "steps: 10 -> 'all'",
        "optim.betas: (0.9, 0.95) -> (0.9, 0.99)",
        "optim.kind: 'adamw' -> 'muon'",
        "rules.0.weight.group: 64 -> 32",
        "rules.1: Rule(pattern='b', weight=None) -> absent",
        "axes: () -> (('embed', None),)",
        "weight: Int4(format='int4', group=64) -> NM(format='nm', n=2, m=4)",
    ]
    assert difference(parent, fork)[4] == "rules.1: absent -> Rule(pattern='b', weight=None)"


def test_suggest_names_the_nearest_or_all() -> None:
    assert suggest("lerning_rate", ["steps", "learning_rate"]) == "did you mean learning_rate?"
    assert suggest("x", ["steps", "seed"]) == "valid: steps, seed"
    assert suggest("x", []) == "valid: none"
