"""What a run of compression has done so far, on disk: a run that is killed goes on at the block it was in.

DIRECTORY/record.json           what is made of what: recipe, source, calibration; another record is another run
DIRECTORY/allocation.json       how the budget was spent, once it is known
DIRECTORY/layer_0007.safetensors, layer_0007.json    one layer's packed weights, their formats, and its rows

Each file appears by a rename, a layer's JSON last, so that a layer is there as a whole or not at all. The residual
stream is not kept: what the layers before make of the calibration is computed again, one pass without solving.
"""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from safetensors.flax import load_file, save_file

from hsai import configuration
from hsai.compress.ledger import Allocation, BlockRow, LayerRow
from hsai.errors import InputError
from hsai.files import atomic_write, read_json, write_json_atomic
from hsai.formats.storage import describe, named_arrays, restore
from hsai.models.transformer import Block

RECORD, ALLOCATION = "record.json", "allocation.json"


class Workbench:
    """The directory of one run. Attributes: `layers`, how many layers it held when it was opened."""

    def __init__(self, directory: Path, record: dict[str, Any]) -> None:
        """Opens `directory` if it is of the same `record`; anything else in its place is thrown away.

        Raises:
          InputError: the directory cannot be made.
        """
        self._directory = directory
        try:
            same = read_json(directory / RECORD) == record
        except InputError:
            same = False
        try:
            if not same:
                shutil.rmtree(directory, ignore_errors=True)
                directory.mkdir(parents=True)
                write_json_atomic(directory / RECORD, record)
        except OSError as error:
            raise InputError(f"cannot write to {directory}: {error.strerror}") from error
        self.layers = len(list(directory.glob("layer_*.json")))

    def load_allocation(self) -> Allocation | None:
        """What was chosen, if that was done."""
        path = self._directory / ALLOCATION
        return configuration.from_dict(Allocation, read_json(path)) if path.exists() else None

    def save_allocation(self, allocation: Allocation) -> None:
        """Keeps what was chosen."""
        write_json_atomic(self._directory / ALLOCATION, configuration.to_dict(allocation))

    def load_layer(self, layer: int, block: Block) -> tuple[Block, list[LayerRow], list[BlockRow]] | None:
        """The layer with its packed weights, its rows, and how its reconstruction went; None if it is not there.

        Args:
          layer: its number.
          block: with dense weights of the same shapes.
        Raises:
          InputError: the files do not fit the block.
        """
        path = self._name(layer)
        if not path.with_suffix(".json").exists():
            return None
        found = read_json(path.with_suffix(".json"))
        rows = [LayerRow(**row) for row in found["rows"]]
        tuned = [BlockRow(**row) for row in found["blocks"]]
        return restore(block, found["formats"], load_file(path)), rows, tuned

    def save_layer(self, layer: int, block: Block, rows: Sequence[LayerRow], tuned: Sequence[BlockRow] = ()) -> None:
        """Keeps a layer's weights and rows."""
        path = self._name(layer)
        with atomic_write(path) as temporary:
            save_file({name: jax.device_get(array) for name, array in named_arrays(block).items()}, temporary)
        content = {
            "formats": describe(block),
            "rows": [dataclasses.asdict(row) for row in rows],
            "blocks": [dataclasses.asdict(row) for row in tuned],
        }
        write_json_atomic(path.with_suffix(".json"), content)

    def remove(self) -> None:
        """Throws all of it away: the run is whole, and stands elsewhere."""
        shutil.rmtree(self._directory)

    def _name(self, layer: int) -> Path:
        return self._directory / f"layer_{layer:04}.safetensors"
