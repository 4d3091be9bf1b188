"""The command line sets any field of a config, typed, and says in one line what it cannot set."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Literal

import pytest

from hsai.configuration import to_dict
from hsai.errors import InputError
from hsai.overrides import list_options, parse_overrides


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int4:
    """Four bits a weight."""

    format: Literal["int4"] = "int4"
    """The name of the format."""

    group: int = 64
    """Weights that share a scale."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NM:
    """N of M weights are kept."""

    format: Literal["nm"] = "nm"
    """The name of the format."""

    n: int = 2
    """Weights kept of four."""

    def __post_init__(self) -> None:
        if not 0 < self.n < 4:
            raise InputError(f"n={self.n} must be 1, 2 or 3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needy:
    """A format that has no default."""

    format: Literal["needy"] = "needy"
    """The name of the format."""

    bits: int
    """Bits a weight."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule of a recipe."""

    pattern: str
    """Which weights."""

    weight: Int4 | NM | Needy = Int4()
    """How they are held."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Scaling of the positions."""

    theta: float = 1e4
    """The base of the frequencies."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optim:
    """The optimizer."""

    learning_rate: float = 3e-4
    """The peak of the schedule."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the two moments."""

    clip: float | None = 1.0
    """Largest norm of the gradient."""

    kind: Literal["adamw", "muon"] = "adamw"
    """Which optimizer."""

    nesterov: bool = False
    """Whether momentum looks ahead."""

    layers: tuple[str, ...] = ()
    """Layers that are trained."""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise InputError(f"learning_rate={self.learning_rate} must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A training run."""

    low: int = 0
    """The lower end."""

    high: int = 10
    """The upper end, above `low`."""

    optim: Optim = Optim()
    """The optimizer."""

    rope: Rope | None = None
    """Scaling of the positions."""

    rules: tuple[Rule, ...] = (Rule(pattern="a"), Rule(pattern="b", weight=NM()))
    """The recipe."""

    more: tuple[Rule, ...] = ()
    """Further rules."""

    axes: tuple[tuple[str, str | None], ...] = ()
    """Pairs of axes."""

    data: Path | None = None
    """Where the text is."""

    log: bool = True
    """Whether to log."""

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise InputError(f"low={self.low} must be below high={self.high}")


def parse(*argv: str, config: Run | None = None) -> Run:
    return parse_overrides(config or Run(), argv, prog="hsai train", description="Trains.")


@pytest.mark.parametrize(
    ("argv", "optim"),
    [
        (["--optim.learning-rate", "1e-3"], Optim(learning_rate=1e-3)),
        (["--optim.learning_rate", "1e-3"], Optim(learning_rate=1e-3)),
        (["--optim.learning-rate=1e-3"], Optim(learning_rate=1e-3)),
        (["--optim.learning-rate", "5", "--optim.learning-rate", "2"], Optim(learning_rate=2.0)),
        (["--optim.learning-rate", "inf"], Optim(learning_rate=math.inf)),
        (["--optim.betas", "0.5", "-0.25"], Optim(betas=(0.5, -0.25))),
        (["--optim.clip", "None"], Optim(clip=None)),
        (["--optim.clip", "-inf"], Optim(clip=-math.inf)),
        (["--optim.kind", "muon"], Optim(kind="muon")),
        (["--optim.nesterov"], Optim(nesterov=True)),
        (["--optim.nesterov", "True", "--optim.no-nesterov"], Optim()),
        (["--optim.nesterov", "true"], Optim(nesterov=True)),
        (["--optim.nesterov", "FALSE"], Optim(nesterov=False)),
        (["--optim.clip", "none"], Optim(clip=None)),
        (["--optim.layers", "none", "true"], Optim(layers=("none", "true"))),
        (["--optim.layers", "a", "-", "c"], Optim(layers=("a", "-", "c"))),
        (["--optim.layers=--x"], Optim(layers=("--x",))),
        (["--optim.layers"], Optim(layers=())),
        ([], Optim()),
    ],
)
def test_a_field_of_each_kind(argv: list[str], optim: Optim) -> None:
    changed = parse(*argv)
    assert changed == Run(optim=optim)
    assert repr(changed) == repr(Run(optim=optim))


def test_other_fields_keep_the_values_of_the_config() -> None:
    config = Run(optim=Optim(kind="muon"), rope=Rope(theta=5.0), data=Path("x"), log=True)
    changed = parse("--no-log", "--rope.theta", "6", "--axes", "embed", "None", "mlp", "model", config=config)
    axes = (("embed", None), ("mlp", "model"))
    assert changed == dataclasses.replace(config, log=False, rope=Rope(theta=6.0), axes=axes)


def test_items_and_variants() -> None:
    changed = parse("--rules.0.weight.group", "32", "--rules.1.pattern", "c", "--rules.1.weight.n", "1")
    assert changed.rules == (Rule(pattern="a", weight=Int4(group=32)), Rule(pattern="c", weight=NM(n=1)))


def test_a_tag_switches_the_variant_wherever_it_stands() -> None:
    for argv in (["--rules.0.weight.format=nm", "--rules.0.weight.n", "3"], ["--rules.0.weight.n=3"]):
        argv = argv if len(argv) == 2 else [*argv, "--rules.0.weight.format", "nm"]
        assert parse(*argv).rules[0] == Rule(pattern="a", weight=NM(n=3))
    kept = parse("--rules.0.weight.format", "int4", config=Run(rules=(Rule(pattern="a", weight=Int4(group=32)),)))
    assert kept.rules[0].weight == Int4(group=32)


def test_the_config_is_checked_after_all_changes() -> None:
    assert parse("--low", "20", "--high", "30") == Run(low=20, high=30)
    with pytest.raises(InputError, match=r"^low=20 must be below high=10$"):
        parse("--low", "20")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--optim.learning-rat 1", "unknown option --optim.learning-rat; did you mean --optim.learning-rate?"),
        ("--optim.learning_rat 1", "unknown option --optim.learning-rat; did you mean --optim.learning-rate?"),
        ("--learning-rate 1", "unknown option --learning-rate; did you mean --optim.learning-rate?"),
        ("--rules.0.weight.n 1", "unknown option --rules.0.weight.n; did you mean --rules.1.weight.n?"),
        ("--optim.no-kind", "unknown option --optim.no-kind; did you mean --optim.kind?"),
        ("-x 1", "unknown option -x; options are spelled --name value"),
        ("-- 1", "unknown option --; options are spelled --name value"),
        ("1 --low 2", "unexpected argument '1'; options are spelled --name value"),
        ("--rope.theta 1", "--rope.theta cannot be set: this config has no rope; give it one in a config file"),
        ("--rope None", "--rope cannot be set: this config has no rope; give it one in a config file"),
        ("--more.0.pattern a", "--more.0.pattern cannot be set: this config has no more; give it one in a config file"),
        ("--optim.learning-rate abc", "--optim.learning-rate: expected float, got 'abc'"),
        ("--optim.learning-rate", "--optim.learning-rate: expected float, got nothing"),
        ("--low 1 2", "--low: expected int, got '1 2'"),
        ("--low 1.5", "--low: expected int, got '1.5'"),
        ("--optim.betas 1", "--optim.betas: expected tuple of (float, float), got '1'"),
        ("--optim.clip no", "--optim.clip: expected float or None, got 'no'"),
        ("--optim.kind sgd", "--optim.kind: expected 'adamw' or 'muon', got 'sgd'"),
        ("--optim.nesterov yes", "--optim.nesterov: expected bool, got 'yes'"),
        ("--optim.nesterov 1", "--optim.nesterov: expected bool, got '1'"),
        ("--optim.no-nesterov True", "--optim.no-nesterov takes no value, got 'True'"),
        ("--axes a", "--axes: expected tuple of tuple of (str, str or None), got 'a'"),
        ("--rules.0.weight.format x", "--rules.0.weight.format: expected 'int4' or 'nm' or 'needy', got 'x'"),
        ("--rules.0.weight.format needy", "rules.0.weight.bits is missing; expected int"),
        ("--optim.learning-rate -1", "optim: learning_rate=-1.0 must be positive"),
        ("--rules.1.weight.n 4", "rules.1.weight: n=4 must be 1, 2 or 3"),
        ("--optim.clip nan", "optim.clip: nan is NaN; a config holds None, bool, int, float, str, Path, tuples"),
    ],
)
def test_a_mistake_is_one_line(argv: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(*argv.split())
    assert str(caught.value).startswith(message)
    assert str(caught.value) == message or message.endswith("tuples")


def test_help_lists_exactly_the_options_that_are_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for argv in (["--help"], ["--low", "3", "-h"]):
        with pytest.raises(SystemExit) as caught:
            parse(*argv)
        assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "hsai train" in text and "Trains." in text
    assert "The peak of the schedule. (default: 0.0003)" in re.sub(r"[\s│]+", " ", text)
    listed = {name for name in re.findall(r"--([a-z][\w.-]*)", text) if not re.search(r"(^|\.)no-", name)} - {"help"}
    assert listed == {name for name, option in list_options(Run, to_dict(Run())).items() if not option.is_closed}
