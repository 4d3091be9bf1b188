"""What tells the directory of a training run from others, for those who do not read it."""

from pathlib import Path


def is_run(directory: Path) -> bool:
    """Whether `directory` holds the checkpoints of a training run."""
    return (directory / "checkpoints").is_dir()
