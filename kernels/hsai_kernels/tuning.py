"""Tiles: what a kernel is cut into, from one place, whichever the kernel.

A kernel brings its own tile for a dtype and a class of shapes. tuned/DEVICE.json, which `scripts/bench_kernels.py
--tune` writes, may hold one that was measured to be faster on a device. What the capability table says the chip's
compiler refuses, or spills registers for, is not used: the backend then does not serve the call (dispatch.py).
"""

import dataclasses
import functools
import json
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from hsai_kernels import capabilities
from hsai_kernels.dispatch import find_device_kind, find_platform

FOLDER = Path(__file__).parent / "tuned"

Sides = Mapping[str, int]
"""Name of a side, or of another setting of the compiler -> its size, at least 1."""

USE_TILES = "use_tiles"
"""Where a tile is from that the context gives."""

FEW_ROWS = 16
"""Up to here reading is all that takes an accelerator's time: decoding, whose tiles are a class of their own."""

Key = tuple[str, str, str]
"""Kernel, dtype and shape class."""

# A user context is part of the key of jit's caches: what was traced with other tiles is traced again.
_chosen = jax.make_user_context(default_value=())
_records: list[list["Use"]] = []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Use:
    """A tile that a kernel was traced with."""

    kernel: str
    dtype: str
    shape: str
    asked: Sides
    """As tuned, or the kernel's own, before it was cut to the call."""
    tile: Sides

    @property
    def key(self) -> Key:
        """What the tile is stored under."""
        return self.kernel, self.dtype, self.shape


def choose_tile(
    kernel: str, *, dtype: jax.typing.DTypeLike, shape: str, own: Sides, fit: Callable[[Sides], Sides] = dict
) -> Sides:
    """The tile that a kernel is to be traced with: that of `use_tiles`, else the device's tuned one, else its `own`.

    Args:
      kernel: its name, with all that makes another program of it (the format of a weight, forward or backward).
      dtype: of the activations.
      shape: the class of shapes that share a tile, in words.
      own: the kernel's default. Tuned tiles have the same sides, and are returned in the same order.
      fit: cuts a tile to what the call has.

    Raises:
      NotImplementedError: the capability table says that the tile does not compile well for the chip.
      ValueError: the same of a tile of `use_tiles`; the tuned file is malformed, or a tile has other sides.
    """
    key = (kernel, jax.numpy.dtype(dtype).name, shape)
    asked, origin = _find_tile(key)
    if asked is None:
        asked = own
    if set(asked) != set(own):
        raise ValueError(f"{origin}: the tile of {', '.join(key)} has sides {sorted(asked)}, needs {sorted(own)}")
    asked = {side: asked[side] for side in own}
    tile = fit(asked)
    refusal = capabilities.find_refusal(find_platform(), find_device_kind(), *key, tile)
    if refusal is not None:
        message = f"has no tile of {capabilities.describe_tile(tile)} in {kernel}: {refusal}"
        # What was chosen explicitly never falls back to another backend.
        raise ValueError(message) if origin == USE_TILES else NotImplementedError(message)
    for record in _records:
        record.append(Use(kernel=key[0], dtype=key[1], shape=key[2], asked=asked, tile=tile))
    return tile


def name_product_shape(rows: int, contraction: int, groups: int | None) -> str:
    """The class of a product's shapes: few rows (decoding) or many, and how many positions share a scale, if any."""
    if groups is None:
        scales = "no scales"
    else:
        scales = "a scale a column" if groups == 1 else f"groups of {contraction // groups}"
    return f"{'few' if rows <= FEW_ROWS else 'many'} rows, {scales}"


@contextmanager
def use_tiles(tiles: Mapping[Key, Sides]) -> Iterator[None]:
    """Gives kernels that are traced inside these tiles, before those of a context around, tuned ones and their own."""
    inside = {key: tuple(sorted(tile.items())) for key, tile in tiles.items()}
    around: Any = dict(_chosen.value)
    with _chosen(tuple(sorted((around | inside).items()))):
        yield


@contextmanager
def record_tiles() -> Iterator[list[Use]]:
    """A list of every tile that a kernel is traced with inside, in order. What jit has cached is not traced again."""
    record: list[Use] = []
    _records.append(record)
    try:
        yield record
    finally:
        # By identity: a record around that holds the same is equal.
        _records[:] = [other for other in _records if other is not record]


def name_device() -> str | None:
    """The device that programs traced here are for, as a file name; None where that is not known.

    A CPU's name has its cores: blocks are chosen by what all of them do together.
    """
    kind = find_device_kind()
    if kind is None:
        return None
    if find_platform() == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        kind = f"{_name_processor()} {cores} cores"
    return re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_")


def read_tuned(device: str) -> dict[Key, Sides]:
    """The tiles stored for a device; none without a file. Raises ValueError, naming the file, if it is malformed."""
    return _read_file(FOLDER / f"{device}.json")


def write_tuned(device: str, command: str, tiles: Mapping[Key, Sides]) -> Path:
    """Stores tiles for a device beside those of other kernels and shapes, with the command that found them."""
    path = FOLDER / f"{device}.json"
    merged = _read_file(path) | dict(tiles)
    fields = ("kernel", "dtype", "shape")
    entries = [dict(zip(fields, key, strict=True)) | {"tile": dict(merged[key])} for key in sorted(merged)]
    lines = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        f'{{"jax": {json.dumps(jax.__version__)}, "command": {json.dumps(command)}, "tiles": [\n{lines}\n]}}\n'
    )
    _read_file.cache_clear()
    return path


def _find_tile(key: Key) -> tuple[Sides | None, object]:
    """The tile of a key that is not the kernel's own, or None; and where it is from."""
    chosen: Any = dict(_chosen.value)
    if key in chosen:
        return dict(chosen[key]), USE_TILES
    device = name_device()
    return (None, None) if device is None else (read_tuned(device).get(key), FOLDER / f"{device}.json")


@functools.cache
def _read_file(path: Path) -> dict[Key, Sides]:
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text())["tiles"]
        tiles: dict[Key, Sides] = {
            (entry["kernel"], entry["dtype"], entry["shape"]): dict(entry["tile"]) for entry in entries
        }
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no file of tuned tiles ({type(error).__name__}: {error})") from error
    for key, tile in tiles.items():
        for side, size in tile.items():
            if type(size) is not int or size < 1:
                raise ValueError(f"{path}: {side} of {', '.join(key)} is {size!r}, must be an integer of at least 1")
    return tiles


@functools.cache
def _name_processor() -> str:
    """The model in Linux's /proc/cpuinfo; elsewhere what Python knows."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = [line.split(":", 1)[1] for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
