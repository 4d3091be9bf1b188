"""Directories that a command is about to make: never overwritten silently, and kept where the same work was done."""

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hsai.cli.places import check_place
from hsai.errors import InputError
from hsai.export.manifest import MANIFEST, read_manifest
from hsai.files import sha256
from hsai.progress import say
from hsai.train.directory import find_own, is_run


def check_targets(
    targets: Iterable[Path], arguments: argparse.Namespace, *, option: str = "--out", holding: str = MANIFEST
) -> None:
    """Refuses, before anything is computed, what could not be written in the end.

    Args:
      targets: the directories.
      arguments: with `overwrite` and `reuse`.
      option: by which they were given.
      holding: the file by which a directory is known to be of the kind that may be replaced.
    Raises:
      InputError: what `check_place` refuses; a target exists, and neither `--overwrite` nor `--reuse` says what to do
        with it; it holds something that is of another kind.
    """
    for target in targets:
        check_place(target, option)
        if not target.exists():
            continue
        if not (arguments.overwrite or arguments.reuse):
            raise InputError(f"{target} exists; give another {option}, or --overwrite")
        if any(target.iterdir()) and not (target / holding).is_file():
            kind = "a bundle" if holding == MANIFEST else "a checkpoint"
            raise InputError(f"{target} holds something else than {kind} (no {holding}); give another {option}")


def check_apart(targets: Iterable[Path], model: Path) -> None:
    """Refuses targets that would take the place of the model that they are made of, or of a part of it or of a run.

    A run has room for what is made of it, but not in the directories that training keeps for itself; a bundle, a
    checkpoint and a file consist of what they hold.

    Raises:
      InputError: a target is the model, or holds it; or lies in it, and it is no run; or it is such a directory of any
        run, or lies in one.
    """
    source = model.resolve()
    for target in targets:
        place = target.resolve()
        own = find_own(place)
        if own is not None:
            raise InputError(f"--out {target} is or lies in {own}, which a training run keeps; give another directory")
        if source == place:
            raise InputError(f"--out {target} is the model itself; give another directory")
        if source.is_relative_to(place):
            raise InputError(f"--out {target} holds the model {model}; give another directory")
        if place.is_relative_to(source) and not is_run(source):
            raise InputError(f"--out {target} lies inside the model {model}; give another directory")


def check_file(target: Path, *, overwrite: bool) -> None:
    """Refuses, before anything is computed, a file that could not be written in the end.

    Raises:
      InputError: what `check_place` refuses; the file exists and is not to be overwritten, or is a directory.
    """
    check_place(target.absolute().parent, "--out")
    if target.is_dir():
        raise InputError(f"{target} is a directory; give the name of a file")
    if target.exists() and not overwrite:
        raise InputError(f"{target} exists; give another --out, or --overwrite")


def is_kept(target: Path, made: Mapping[str, Any], arguments: argparse.Namespace) -> bool:
    """Whether `--reuse` keeps `target`: a whole bundle whose manifest says that it was made as `made` says.

    Raises:
      InputError: it was not, and there is no `--overwrite` to make it again.
    """
    if not (arguments.reuse and target.exists()):
        return False
    fault = _find_fault(target, made)
    if fault is None:
        return True
    if not arguments.overwrite:
        raise InputError(f"{target} cannot be reused: {fault}; --overwrite makes it again")
    say(f"{target} is made again: {fault}")
    return False


def _find_fault(target: Path, made: Mapping[str, Any]) -> str | None:
    """Why the bundle at `target` is not the one that would be made now; None if it is."""
    try:
        manifest = read_manifest(target)
    except InputError as error:
        return str(error)
    for name, value in made.items():
        if manifest.extra.get(name) != value:
            return f"its {name} is another"
    for name, record in manifest.files.items():
        if not (target / name).is_file() or sha256(target / name) != record.sha256:
            return f"{name} is missing or altered"
    return None
