"""Which words are options, and that a mistyped one is named before what seems to be missing."""

from pathlib import Path

import pytest

from hsai.cli.parser import Parser, is_option
from hsai.errors import InputError


@pytest.fixture
def parser() -> Parser:
    parser = Parser(prog="hsai test")
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", required=True)
    parser.add_argument("--scale", type=float)
    return parser


@pytest.mark.parametrize("word", ["-x", "--out", "--out=a b", "--", "-inf-1", "-a/b"])
def test_options(word: str) -> None:
    assert is_option(word)


@pytest.mark.parametrize("word", ["", "-", "-1", "-1e-3", "-inf", "x-y", "- a", "--a b", "-- # comment"])
def test_values(word: str) -> None:
    assert not is_option(word)


def test_words_are_read(parser: Parser) -> None:
    found = parser.parse(["m", "--out=a b", "--scale", "-1"])
    assert (found.model, found.out, found.scale) == (Path("m"), "a b", -1.0)
    assert parser.parse(["--out", "o", "--", "--odd"]).model == Path("--odd")


@pytest.mark.parametrize("words", [["m", "--ouput", "o"], ["m", "--out", "o", "--ouput=3"]])
def test_a_mistyped_option_is_answered_by_the_nearest(words: list[str], parser: Parser) -> None:
    with pytest.raises(InputError, match=r"^unknown option --ouput(=3)?; did you mean --out\?$"):
        parser.parse(words)


def test_abbreviations_are_refused(parser: Parser) -> None:
    with pytest.raises(InputError, match="unknown option --ou"):
        parser.parse(["m", "--ou", "o"])


def test_what_is_missing_is_named(parser: Parser) -> None:
    with pytest.raises(InputError, match=r"required: model, --out \(see hsai test --help\)"):
        parser.parse([])
