"""Where a run begins: the model on disk whose weights, tokenizer and files it goes on with.

The rooms that read models of all kinds stand above this one; what reads one is handed in (`Opener`), and is
`hsai.export.source.open_model`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hsai.configuration import difference
from hsai.data.assets import ASSET_FILES
from hsai.data.tokenizer import Tokenizer
from hsai.errors import InputError
from hsai.files import atomic_write, sha256
from hsai.models import Transformer, TransformerConfig

if TYPE_CHECKING:
    from hsai.config import RunConfig


class ModelOnDisk(Protocol):
    """A model that was read: `hsai.export.source.ModelSource`, whose fields have words of their own."""

    @property
    def directory(self) -> Path: ...
    @property
    def config(self) -> TransformerConfig: ...
    @property
    def model(self) -> Transformer: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def assets(self) -> dict[str, bytes]: ...
    @property
    def origin(self) -> dict[str, Any]: ...
    @property
    def sha256(self) -> str: ...


Opener = Callable[[Path], ModelOnDisk]

# How a model is computed with, and not what its weights are.
_FREE_TO_CHANGE = ("dtype:", "max_length:")


def open_origin(run: "RunConfig", opener: Opener) -> ModelOnDisk | None:
    """The model that a run begins from; None where its weights are drawn.

    Raises:
      InputError: there is none, or it is another model than that of the config, whose fields are then named.
    """
    directory = run.train.initialize_from
    if directory is None:
        return None
    found = _open("train.initialize_from", directory, opener)
    changes = [line for line in difference(found.config, run.model) if not line.startswith(_FREE_TO_CHANGE)]
    if changes:
        raise InputError(
            f"train.initialize_from={str(directory)!r} is another model than the config's; "
            f"change {', '.join(f'model.{change}' for change in changes)}"
        )
    return found


def open_teacher(run: "RunConfig", opener: Opener) -> ModelOnDisk | None:
    """The model that a run is distilled from; None where there is none.

    Raises:
      InputError: there is none on the disk, or its words or layers are not the student's.
    """
    distill = run.train.distill
    if distill is None:
        return None
    found = _open("train.distill.teacher", distill.teacher, opener)
    names = ("vocab", "layers", "embed") if distill.hidden else ("vocab",)
    for name in names:
        theirs, ours = getattr(found.config, name), getattr(run.model, name)
        if theirs != ours:
            raise InputError(f"train.distill.teacher={str(distill.teacher)!r} has {name} {theirs}, the model {ours}")
    return found


def check_words(teacher: ModelOnDisk, tokenizer: Tokenizer) -> None:
    """Raises `InputError` unless the teacher reads the same tokens."""
    if not teacher.tokenizer.cuts_like(tokenizer):
        raise InputError(f"the teacher {teacher.directory} has another tokenizer than the run; it must be the same")


def describe_origin(found: ModelOnDisk) -> dict[str, Any]:
    """What a checkpoint keeps of a model that went into a run."""
    return {"directory": str(found.directory.resolve()), "sha256": found.sha256, "origin": found.origin}


def write_assets(found: ModelOnDisk, directory: Path) -> None:
    """Puts the files that travel with a model (chat template, generation config) beside what becomes of it."""
    for name in ASSET_FILES:
        if name in found.assets:
            with atomic_write(directory / name) as temporary:
                temporary.write_bytes(found.assets[name])


def read_tokenizer(directory: Path, record: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a run, as the record of its checkpoint describes it; `InputError` if it was altered."""
    path = directory / "tokenizer.json"
    if sha256(path) != record["tokenizer_sha256"]:
        raise InputError(f"{path} was altered: its SHA-256 is not the one of the checkpoint's tokenizer")
    return Tokenizer.reload(path, record.get("tokenizer", {}))


def _open(field: str, directory: Path, opener: Opener) -> ModelOnDisk:
    try:
        return opener(directory)
    except InputError as error:
        raise InputError(f"{field}: {error}") from error
