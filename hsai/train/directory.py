"""What tells the directory of a training run from others, for those who do not read it."""

from pathlib import Path

OWN = ("checkpoints", "tensorboard")
"""Directories of a run that training alone writes: a number in the first is a step, what it does not know in either it
may read, or remove."""


def is_run(directory: Path) -> bool:
    """Whether `directory` holds the checkpoints of a training run."""
    return (directory / "checkpoints").is_dir()


def find_own(place: Path) -> Path | None:
    """That of the `OWN` directories of any run which the absolute `place` is, or lies in; None if it is apart.

    A run has a tokenizer beside its checkpoints; other directories may have checkpoints of their own.
    """
    for path in (place, *place.parents):
        if path.name in OWN and is_run(path.parent) and (path.parent / "tokenizer.json").is_file():
            return path
    return None
