"""A command's words: argparse, with every complaint as one line, and a mistyped option answered by the nearest one."""

import argparse
import contextlib
from collections.abc import Sequence
from typing import Any, NoReturn

from hsai.configuration import suggest
from hsai.errors import InputError


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are `InputError`s.

    Attributes:
      options: all spellings of all options, such as "--out".
    """

    def __init__(self, **settings: Any) -> None:
        self.options: list[str] = []
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """As argparse does, and keeps the spellings."""
        action = super().add_argument(*names, **settings)
        self.options += action.option_strings
        return action

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """As `parse_args`, but an unknown option is refused first: argparse would miss the one that it stands for."""
        for word in words:
            if word == "--":
                break
            if is_option(word) and word.partition("=")[0] not in self.options:
                raise InputError(f"unknown option {word}; {suggest(word, self.options)}")
        return self.parse_args(words)

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage and exiting."""
        raise InputError(f"{message} (see {self.prog} --help)")


def is_option(word: str) -> bool:
    """Whether a word names an option, by argparse's rules: "-", "-3" and a prompt that has a space do not."""
    if not word.startswith("-") or word == "-" or " " in word.partition("=")[0]:
        return False
    with contextlib.suppress(ValueError):
        float(word)
        return False
    return True
