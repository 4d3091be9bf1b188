"""`bench_kernels.py --tune`: looks for faster tiles of the kernels that a case runs, on the machine at hand.

From the tile that a kernel would be traced with, one side after the other is halved and doubled for as long as that is
faster; kernels that share a case are searched one after the other. Two tiles take turns, as ours and peers do. What the
kernel or the compiler refuses, or the capability table says would be refused, is never run.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterator, Mapping

import jax

from bench.timing import Case, Runner, time_by_turns
from hsai_kernels.tuning import Key, Sides, Use, record_tiles, use_tiles

FASTER = 1.02
"""A step is taken for a ratio above this: less is noise."""

Frozen = tuple[tuple[str, int], ...]

LARGEST_GROWTH = 4
"""Tiles of more elements than this many of the kernel's own are not tried: blocks exist so that memory is bounded."""


def find_tiles(case: Case, *, rounds: int, seconds: float) -> tuple[dict[Key, Sides], Case]:
    """The fastest tiles found for the kernels of a case, those that changed, and the case with them.

    Its peer is the same with the tiles as they were. Prints what was tried. `rounds` and `seconds` are of each pair.
    """
    with record_tiles() as used:
        case.ours.build()
    own = {use.key: use for use in used}
    if not own:
        print("  no kernel of it asks for a tile on this platform", flush=True)
    found: dict[Key, Sides] = {}
    best = case.ours
    for key in own:
        found, best = _climb(case, key, own[key], found, best, rounds=rounds, seconds=seconds)
    changed = {key: tile for key, tile in found.items() if tile != own[key].asked}
    before = dataclasses.replace(case.ours, name="tiles as they were")
    return changed, dataclasses.replace(case, ours=best, peers=[before] if changed else [], explain=None)


def _climb(
    case: Case, key: Key, own: Use, found: dict[Key, Sides], best: Runner, *, rounds: int, seconds: float
) -> tuple[dict[Key, Sides], Runner]:
    """`found` with the best tile of one kernel, and its runner: `best` is that of what was found so far."""
    tile, tried = own.asked, {_freeze(own.asked), _freeze(own.tile)}
    print(f"  {', '.join(key)}: {_describe(tile)}", flush=True)
    while True:
        for other in _list_neighbours(tile, own.asked):
            if _freeze(other) in tried:
                continue
            tried.add(_freeze(other))
            tiles = found | {key: other}
            runner, refusal = _build(case, key, tiles, tried)
            if runner is None:
                print(f"    {_describe(other)}: {refusal}", flush=True)
                continue
            times, others = time_by_turns([best, runner], rounds=rounds, seconds=seconds)
            ratio = statistics.median(a / b for a, b in zip(times, others, strict=True))
            print(f"    {_describe(other)}: {ratio:.3f}x", flush=True)
            if ratio > FASTER:
                tile, found, best = other, tiles, runner
                break
        else:
            return found, best


def _build(case: Case, key: Key, tiles: Mapping[Key, Sides], tried: set[Frozen]) -> tuple[Runner | None, str]:
    """A runner with these tiles, or None and why there is none; adds to `tried` what a tile of `key` is cut to."""
    try:
        with use_tiles(tiles), record_tiles() as used:
            run = case.ours.build()
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        return None, str(error).splitlines()[0]
    fitted = [use.tile for use in used if use.key == key and use.asked == tiles[key]]
    if not fitted:
        return None, "the kernel does not serve the case with it"
    if fitted[0] != tiles[key]:
        if _freeze(fitted[0]) in tried:
            return None, "cut to the case, it is one that was tried"
        tried.add(_freeze(fitted[0]))
    return Runner(name="ours", build=lambda: run, times=case.ours.times), ""


def _list_neighbours(tile: Sides, own: Sides) -> Iterator[dict[str, int]]:
    for side, size in tile.items():
        for other in (2 * size, size // 2):
            neighbour = {**tile, side: other}
            if other >= 1 and math.prod(neighbour.values()) <= LARGEST_GROWTH * math.prod(own.values()):
                yield neighbour


def _freeze(tile: Sides) -> Frozen:
    return tuple(sorted(tile.items()))


def _describe(tile: Sides) -> str:
    return " ".join(f"{side} {size}" for side, size in tile.items())
