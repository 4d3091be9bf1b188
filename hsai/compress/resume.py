"""What a run of compression has done so far, on disk: a run that is killed goes on at the block it was in.

DIRECTORY/record.json           what is made of what, and by which hsai; another record is another run
DIRECTORY/scales_0007.safetensors, scales_0007.json  one layer's scales of channels, and its rows; scales_head.* too
DIRECTORY/trials_0007.json      what each candidate of one layer would cost; trials_tables.json too
DIRECTORY/allocation.json       how the budget was spent, once it is known
DIRECTORY/layer_0007.safetensors, layer_0007.json    one layer's packed weights, their formats, and its rows;
                                layer_head.* of what comes behind the layers

Each file appears by a rename, the JSON of two last, so that a layer is there as a whole or not at all. The residual
stream is not kept: what the layers before make of the calibration is computed again, one pass without solving.

One run at a time works there (a lock sees to that), and nothing is removed that no run wrote.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.flax import load_file, save_file

from hsai import configuration
from hsai.compress.allocate import Allocation, Item
from hsai.compress.ledger import BlockRow, LayerRow, ScaleRow
from hsai.errors import InputError
from hsai.files import atomic_write, lock_directory, read_json, write_json_atomic
from hsai.formats import Weight
from hsai.formats.storage import describe, fill, named_arrays, named_weights, restore

RECORD, ALLOCATION, LOCK = "record.json", "allocation.json", ".lock"
OWN = re.compile(r"\.?(record|allocation|scales(_\d+|_head)?|trials_(\d+|tables)|layer_(\d+|head))\..*|\.lock")
"""Names of files that a run writes or, of scales without a number, wrote; those of a write that was cut off too."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SolvedLayer:
    """One layer, or what comes behind all of them, once it is solved."""

    weights: Mapping[str, Weight]
    """Packed, by their names in the model."""

    rows: tuple[LayerRow, ...]
    """One a weight."""

    blocks: tuple[BlockRow, ...]
    """One, where the layer was reconstructed."""


class Workbench:
    """The directory of one run, locked until it is closed, or the process ends; a context manager.

    Attributes:
      found: what it held when it was opened, for people: "2 solved layers"; "" if nothing.
      changed: by which parts of its record it was another run's; none if it was new, or the same one's.
      discarded: what that other run had done, for people, and was thrown away; "" if nothing.
    """

    def __init__(self, directory: Path, record: dict[str, Any]) -> None:
        """Opens `directory`; what a run of another `record` left in its place is thrown away.

        Raises:
          InputError: the directory cannot be made; it is another's (`check_unfinished`), or in use by another run.
        """
        self._directory = directory
        self.changed: tuple[str, ...] = ()
        self.discarded = ""
        check_unfinished(directory)
        self._lock = lock_directory(directory, LOCK, option="--out")
        try:
            before = read_json(directory / RECORD) if (directory / RECORD).exists() else None
            if before != record:
                if before is not None:
                    self.changed = tuple(name for name in before | record if before.get(name) != record.get(name))
                    self.discarded = self._describe()
                for path in self._list_own():
                    path.unlink()
                write_json_atomic(directory / RECORD, record)
        except OSError as error:
            self.close()
            raise InputError(f"cannot write to {directory}: {error.strerror}") from error
        self.found = self._describe()

    def __enter__(self) -> "Workbench":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets another run have the directory, which stays as it is."""
        self._lock.close()

    def load_scales(
        self, layer: int | None, like: Mapping[str, jax.ShapeDtypeStruct]
    ) -> tuple[Mapping[str, np.ndarray], list[ScaleRow]] | None:
        """The factors of a layer's channels, by what makes them, and their rows; None if they were not found.

        Args:
          layer: its number; None of the head.
          like: what factors there are, and their shapes.
        Raises:
          InputError: the files do not fit `like`, or cannot be read.
        """
        found = self._load(_name_scales(layer))
        if found is None:
            return None
        return jax.device_get(fill(dict(like), found[0])), [ScaleRow(**row) for row in found[1]]

    def save_scales(self, layer: int | None, factors: Mapping[str, np.ndarray], rows: Sequence[ScaleRow]) -> None:
        """Keeps what was found."""
        self._save(_name_scales(layer), factors, [dataclasses.asdict(row) for row in rows])

    def load_trials(self, layer: int | None) -> list[Item] | None:
        """What was found of the layer's candidates, or, for None, of the tables', if they were tried."""
        path = self._name_trials(layer)
        return [configuration.from_dict(Item, item) for item in read_json(path)] if path.exists() else None

    def save_trials(self, layer: int | None, items: Sequence[Item]) -> None:
        """Keeps what was found."""
        write_json_atomic(self._name_trials(layer), [configuration.to_dict(item) for item in items])

    def list_trials(self) -> dict[int | None, list[Item]]:
        """All that was found of candidates, by layer; None for the tables."""
        numbers = [int(path.stem.removeprefix("trials_")) for path in self._directory.glob("trials_[0-9]*.json")]
        found = {place: self.load_trials(place) for place in (None, *sorted(numbers))}
        return {place: items for place, items in found.items() if items is not None}

    def adopt_trials(self, trials: Mapping[int | None, Sequence[Item]]) -> None:
        """Keeps what another run found of the same candidates; `found` tells of it."""
        for place, items in trials.items():
            self.save_trials(place, items)
        self.found = self._describe()

    def load_allocation(self) -> Allocation | None:
        """What was chosen, if that was done."""
        path = self._directory / ALLOCATION
        return configuration.from_dict(Allocation, read_json(path)) if path.exists() else None

    def save_allocation(self, allocation: Allocation) -> None:
        """Keeps what was chosen."""
        write_json_atomic(self._directory / ALLOCATION, configuration.to_dict(allocation))

    def load_layer(self, layer: int | None, shapes: Mapping[str, tuple[int, ...]]) -> SolvedLayer | None:
        """What was solved in a layer; None if it is not there.

        Args:
          layer: its number; None of the head.
          shapes: of its packed weights, by their names.
        Raises:
          InputError: the files do not fit `shapes`, or cannot be read.
        """
        found = self._load(_name_layer(layer))
        if found is None:
            return None
        arrays, content = found
        outline = {name: nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32)) for name, shape in shapes.items()}
        weights = named_weights(restore(outline, content["formats"], arrays))
        return SolvedLayer(
            weights={name: param.get_value() for name, param in weights.items()},
            rows=tuple(LayerRow(**row) for row in content["rows"]),
            blocks=tuple(BlockRow(**row) for row in content["blocks"]),
        )

    def save_layer(self, layer: int | None, solved: SolvedLayer) -> None:
        """Keeps what was solved."""
        weights = {name: nnx.Param(value) for name, value in solved.weights.items()}
        content = {
            "formats": describe(weights),
            "rows": [dataclasses.asdict(row) for row in solved.rows],
            "blocks": [dataclasses.asdict(row) for row in solved.blocks],
        }
        self._save(_name_layer(layer), named_arrays(weights), content)

    def remove(self) -> None:
        """Throws all of it away, and closes: the run is whole, and stands elsewhere."""
        for path in self._list_own():
            path.unlink()
        (self._directory / LOCK).unlink()
        self.close()
        with contextlib.suppress(OSError):  # what somebody else put there stays
            self._directory.rmdir()

    def _save(self, name: str, arrays: Mapping[str, jax.Array | np.ndarray], content: Any) -> None:
        """Two files, of which the JSON says that both are there."""
        path = self._directory / f"{name}.safetensors"
        with atomic_write(path) as temporary:
            save_file(jax.device_get(dict(arrays)), temporary)
        write_json_atomic(path.with_suffix(".json"), content)

    def _load(self, name: str) -> tuple[dict[str, jax.Array], Any] | None:
        """What `_save` was given; None if it did not come to its end."""
        path = self._directory / f"{name}.safetensors"
        if not path.with_suffix(".json").exists():
            return None
        try:
            arrays = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot read {path}: {error}; remove {self._directory} to begin anew") from error
        return arrays, read_json(path.with_suffix(".json"))

    def _name_trials(self, layer: int | None) -> Path:
        return self._directory / ("trials_tables.json" if layer is None else f"trials_{layer:04}.json")

    def _list_own(self) -> Iterator[Path]:
        """The files that a run wrote, but for the lock."""
        return (path for path in list(self._directory.iterdir()) if OWN.fullmatch(path.name) and path.name != LOCK)

    def _describe(self) -> str:
        """What is here, for people."""
        layers = len(list(self._directory.glob("layer_[0-9]*.json")))
        words = [f"{layers} solved layer{'s' * (layers > 1)}"] if layers else []
        words += ["the head"] if (self._directory / f"{_name_layer(None)}.json").exists() else []
        words += ["trials of tables"] if self._name_trials(None).exists() else []
        tried = len(list(self._directory.glob("trials_[0-9]*.json")))
        words += [f"trials of {tried} layer{'s' * (tried > 1)}"] if tried else []
        words += ["its allocation"] if (self._directory / ALLOCATION).exists() else []
        scaled = len(list(self._directory.glob("scales_[0-9]*.json")))
        words += [f"scales of {scaled} layer{'s' * (scaled > 1)}"] if scaled else []
        return ", ".join(words)


def check_unfinished(directory: Path) -> None:
    """Raises `InputError` for a directory that is there, and that no run left, or in which one is at work."""
    if not directory.is_dir():
        return
    if (directory / LOCK).is_file():
        lock_directory(directory, LOCK, option="--out").close()
    if (directory / RECORD).is_file():
        if not isinstance(read_json(directory / RECORD), dict):
            raise InputError(f"{directory / RECORD} is no record of an unfinished compression; move {directory} away")
    elif any(not OWN.fullmatch(path.name) for path in directory.iterdir()):
        raise InputError(
            f"{directory}, where unfinished work is kept, holds something else (no {RECORD}); move it away, or give "
            "another --out"
        )


def _name_layer(layer: int | None) -> str:
    return "layer_head" if layer is None else f"layer_{layer:04}"


def _name_scales(layer: int | None) -> str:
    return "scales_head" if layer is None else f"scales_{layer:04}"
