"""Checkpoints: the state as named arrays in TensorStore through Orbax, and a JSON record of where the run stood.

Orbax writes under a temporary name and renames, so a run that is killed while it saves leaves its last checkpoint
whole. Just before the rename the files are sealed (see seal.py), and a seal is checked before its files are read. A
checkpoint is restored onto any mesh.
"""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from hsai.errors import InputError
from hsai.formats.storage import fill, named_arrays
from hsai.processes import agree
from hsai.signals import held
from hsai.train.seal import check_seal, write_seal

T = TypeVar("T")
logging.getLogger("absl").setLevel(logging.CRITICAL)  # there Orbax reports each step it takes, and what it also raises


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How often the state is saved, and how much of it is kept."""

    every: int = 500
    """Steps between checkpoints; the last step is always saved."""

    keep: int = 2
    """How many checkpoints stay on disk; older ones are removed."""

    def __post_init__(self) -> None:
        for name in ("every", "keep"):
            if getattr(self, name) < 1:
                raise InputError(f"checkpoint.{name}={getattr(self, name)} must be at least 1")


LOCK = ".lock"
"""The file of a run's directory that a training process holds; the first that a run makes, and never removed."""

RUN_FILES = ("config.json", "tokenizer.json", "metrics.jsonl", "tensorboard", "loss.png", "result.json")
"""What a run writes beside its checkpoints, over whatever has those names."""


class Checkpointer:
    """The checkpoints of one run; use as a context manager, which waits for writes to end.

    Args:
      directory: of the checkpoints alone.
      config: how to save; None to read only, which changes nothing on disk, so that a run may go on meanwhile.
    """

    def __init__(self, directory: Path, config: CheckpointConfig | None) -> None:
        if config is None:
            options = ocp.CheckpointManagerOptions(read_only=True)
        else:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=config.keep,
                cleanup_tmp_directories=True,  # what a killed run was writing
                async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            )
        self._every = 0 if config is None else config.every
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "record": ocp.JsonCheckpointHandler()}
        self.directory = directory.resolve()
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
        self._saving: int | None = None
        self._checked: set[int] = set()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with held():
            self._manager.close()

    @property
    def latest(self) -> int | None:
        """The step of the newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def is_due(self, step: int) -> bool:
        """Whether `save` will save this step by itself: a multiple of `config.every`."""
        return self._every > 0 and step % self._every == 0

    def save(self, step: int, state: Any, record: dict[str, Any], *, force: bool = False) -> bool:
        """Saves in the background if `step` is due, or `force`; returns whether it does.

        `record` is what the state cannot say: the position in the data and the resolved config, as JSON.
        """
        if not (self.is_due(step) or force) or step == self.latest:
            return False
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(named_arrays(state)), record=ocp.args.JsonSave(record))
        self._manager.wait_until_finished()  # `_seal` looks for the one step that is being written
        self._saving = step
        with held():  # Orbax starts threads, which its `close` waits for
            # Forced: left to itself, Orbax also saves the first step that it is shown.
            return self._manager.save(step, args=items, force=True)

    def read_record(self, step: int | None = None, *, verify: bool = True) -> dict[str, Any]:
        """The JSON record of `step` (default: the newest); raises as `restore`. The seal takes reading all files; who
        only wants to refuse something early goes without."""
        step = self._find(step)
        if verify:
            self._check(step)
        record: dict[str, Any] = self._read(step, "record", ocp.args.JsonRestore())
        return record

    def restore(
        self,
        like: T,
        step: int | None = None,
        *,
        prefix: str = "",
        fill_new: Callable[[str], float | None] = lambda name: None,
    ) -> T:
        """The state at `step` (default: the newest), laid out like the abstract tree `like`.

        Args:
          like: `jax.ShapeDtypeStruct`s with shardings.
          step: of the checkpoint.
          prefix: where `like` stands within what was saved, such as "model."; the rest is then not read.
          fill_new: what an array holds, by its name, that older checkpoints had not; None of one that must be there.
        Raises:
          InputError: there is no such checkpoint, it was altered, or its arrays are not those of `like`.
        """
        step = self._find(step)
        self._check(step)
        names = {prefix + name: leaf for name, leaf in named_arrays(like).items()}
        path = self.directory / str(step)
        try:
            stored = self._manager.item_metadata(step)["state"]
        except (OSError, ValueError, KeyError) as error:
            raise _unreadable(path, error) from error
        if stored is None:
            raise _unreadable(path, FileNotFoundError("its index is missing"))
        absent = {name: fill_new(name) for name in names if name not in stored.tree}
        filled = {name: (names.pop(name), value) for name, value in absent.items() if value is not None}
        for name in sorted(set(names) ^ {name for name in stored.tree if name.startswith(prefix)})[:1]:
            kind = "is missing" if name in names else "is unknown to this model"
            raise InputError(f"checkpoint {path} does not fit: array {name!r} {kind}")
        for name, leaf in names.items():
            found = stored.tree[name]
            if tuple(found.shape) != leaf.shape:
                raise InputError(
                    f"checkpoint {path} does not fit: array {name!r} is {list(found.shape)}, not {list(leaf.shape)}"
                )
        how = ocp.checkpoint_utils.construct_restore_args(names)
        arrays = self._read(step, "state", ocp.args.PyTreeRestore(names, restore_args=how, partial_restore=True))
        for name, (leaf, value) in filled.items():
            arrays[name] = jax.device_put(jnp.full(leaf.shape, value, leaf.dtype), leaf.sharding)
        return fill(like, {name.removeprefix(prefix): array for name, array in arrays.items()})

    def _find(self, step: int | None) -> int:
        steps = sorted(self._manager.all_steps())
        found = (steps[-1] if steps else None) if step is None else step
        if found is None or found not in steps:
            which = "" if step is None else f" of step {step}"
            raise InputError(f"no checkpoint{which} in {self.directory}; there are: {steps or 'none'}")
        return found

    def _seal(self) -> None:
        """Called by Orbax on the first process, when all have written and before the directory gets its name."""
        (temporary,) = self.directory.glob(f"{self._saving}.orbax-checkpoint-tmp*")
        write_seal(temporary)

    def _check(self, step: int) -> None:
        """Raises `InputError` unless the files of `step` are those that were written; each process reads a share."""
        if step in self._checked:
            return
        path = self.directory / str(step)
        try:
            agree(lambda: check_seal(path, part=jax.process_index(), parts=jax.process_count()))
        except InputError as error:
            raise InputError(f"checkpoint {step} cannot be used: {error}; remove {path} to use an older one") from error
        self._checked.add(step)

    def _read(self, step: int, item: str, how: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**{item: how}))[item]
        except (OSError, ValueError, KeyError) as error:
            raise _unreadable(self.directory / str(step), error) from error


def _unreadable(path: Path, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200]
    return InputError(f"checkpoint {path} cannot be read ({reason}); remove it to use an older one")
