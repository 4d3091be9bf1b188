"""What a run of scripts/bench_frontier.py measures on, and its record, which is whole after every line."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hsai.compress.calibration import CalibrationConfig, digest_windows, draw_windows
from hsai.configuration import from_dict
from hsai.errors import InputError
from hsai.evaluate import Pair
from hsai.export.history import list_steps
from hsai.export.source import ModelRecord
from hsai.files import read_json, write_json_atomic

Row = dict[str, Any]

NOTHING: Row = dict.fromkeys(("recipe", "commit", "date", "calibration_tokens", "sha256"))
"""What a row says of what no command of ours made."""

OF_ONE_RUN = ("calibration", "importance", "text", "tokens_sha256", "dense_sha256", "sources_sha256", "command")
"""In what the record of a run that is gone on with must be the same; the last is of its machine."""


def list_calibrations(name: str, origin: Mapping[str, Any], stream: np.ndarray) -> list[CalibrationConfig]:
    """What a bundle was calibrated on, by what it says in `origin`: its own calibration, the first, and those of what
    it was made of or trained from.

    Raises:
      InputError: one of them read another text than this stream.
    """
    found = []
    for step in list_steps(origin):
        if step.get("calibration_sha256") is None:
            continue
        config = from_dict(CalibrationConfig, step["recipe"]["calibration"])
        try:
            seen = digest_windows(draw_windows(stream, config))
        except InputError:  # a text that is too short for it
            seen = ""
        if seen != step["calibration_sha256"]:
            raise InputError(f"{name} was calibrated on another text than the one that llama.cpp gets")
        found.append(config)
    return found


def choose_calibration(configs: Sequence[CalibrationConfig]) -> CalibrationConfig:
    """What llama.cpp gets beside bundles of these calibrations: the largest of them, so that no side is told by more
    text, and the same windows where all are alike; where there are none, the default."""
    return max(configs, key=lambda config: config.tokens, default=CalibrationConfig())


def describe_bundle(record: ModelRecord, calibrations: Sequence[CalibrationConfig]) -> Row:
    """What a row says of a bundle besides its numbers: whether it is stale can be seen by who made it, and when."""
    origin = record.origin
    return {
        "recipe": origin.get("recipe_name"),
        "commit": origin.get("commit"),
        "date": origin.get("cost", {}).get("machine", {}).get("date"),
        "calibration_tokens": max((config.tokens for config in calibrations), default=None),
        "sha256": record.sha256,
    }


def choose_chunks(pairs: Sequence[Pair], most: int, stream: np.ndarray) -> list[Pair]:
    """At most `most` chunks, spread evenly over the text, but for those whose scored half stands in the stream that is
    calibrated on: texts repeat themselves."""
    seen = np.asarray(stream, "<i4").tobytes()
    spread = [pairs[index * len(pairs) // most] for index in range(most)] if len(pairs) > most else pairs
    return [pair for pair in spread if np.asarray(pair.continuation, "<i4").tobytes() not in seen]


def digest(pairs: Sequence[Pair]) -> str:
    """SHA-256 of the tokens that are measured on."""
    tokens = [token for pair in pairs for token in (*pair.context, *pair.continuation)]
    return hashlib.sha256(np.asarray(tokens, "<i4").tobytes()).hexdigest()


class FrontierRecord:
    """The rows of a run in the order in which they came, and the file that has all of them after each.

    Args:
      path: of the file; None keeps no record.
      header: what holds of all rows: `machine`, and the rest of `OF_ONE_RUN`.
      resumed: whether rows that are there already are kept.
      sha256: of each bundle by its name; a kept row of another bundle is dropped.
    Raises:
      InputError: `resumed`, and the file is of another run.
    """

    def __init__(
        self, path: Path | None, header: Mapping[str, Any], *, resumed: bool, sha256: Mapping[str, str]
    ) -> None:
        self._path, self._header = path, dict(header)
        self._rows: dict[tuple[str, str], Row] = {}
        if not resumed or path is None or not path.exists():
            return
        before = read_json(path)
        for name in OF_ONE_RUN:
            old, new = (run["machine"] if name in run["machine"] else run for run in (before, self._header))
            if old.get(name) != new[name]:
                raise InputError(f"{path} is of another run: its {name} is {old.get(name)!r}, not {new[name]!r}")
        for row in before["frontier"]:
            if row["sha256"] == (sha256.get(row["model"]) if row["side"] == "hsai" else None):
                self._rows[row["model"], row["side"]] = row

    def find(self, name: str, side: str) -> Row | None:
        """The row of a model that an earlier run measured."""
        return self._rows.get((name, side))

    def add(self, row: Row) -> None:
        """Keeps a row, in the place of an older one of the same model, and writes them all."""
        self._rows[row["model"], row["side"]] = row
        self._write(complete=False)

    def close(self) -> None:
        """No more rows will come."""
        self._write(complete=True)

    def _write(self, *, complete: bool) -> None:
        if self._path is not None:
            rows = list(self._rows.values())
            write_json_atomic(self._path, self._header | {"complete": complete, "frontier": rows})
