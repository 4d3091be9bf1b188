"""What a model went through before its last step, as manifests and the records of runs hold it.

`ModelRecord.origin` is JSON that travels from bundle to bundle. Part of it holds of whatever is made of a model: its
run, its corpus, the models that training began from. The rest, `STEP`, says how one bundle was made; of what is made of
that one it is the past, and stands under "made_of".
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hsai.export.source import ModelRecord

STEP = (
    "made_of",
    "source_sha256",
    "dtype",
    "recipe",
    "recipe_name",
    "sources_sha256",
    "mesh",
    "calibration_sha256",
    "measured_sha256",
    "ledger",
    "cost",
    "command",
    "commit",
    "graphs",
    "activations",
)
"""What commands write of the bundle that they make."""

SUMS = ("parameters", "bytes", "bits_per_weight")
"""What stays of the ledger of a bundle that another was made of."""


def pass_on(source: ModelRecord) -> dict[str, Any]:
    """The origin of what is made of `source` with other weights: what holds of both, and under "made_of" the directory,
    SHA-256 and origin of a source that was itself made by a command, its ledger by its sums."""
    step = {name: value for name, value in source.origin.items() if name in STEP}
    rest = {name: value for name, value in source.origin.items() if name not in STEP}
    if not step:
        return rest
    if "ledger" in step:
        step["ledger"] = {name: value for name, value in step["ledger"].items() if name in SUMS}
    directory = str(source.directory.resolve())
    return rest | {"made_of": {"directory": directory, "sha256": source.sha256, "origin": step}}


def list_steps(origin: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """`origin`, and those of the models that it was made of or trained from, the newest first; no teachers."""
    yield origin
    for entry in (origin.get("made_of"), origin.get("sources", {}).get("initialize_from")):
        if entry is not None:
            yield from list_steps(entry["origin"])


def tell_history(origin: Mapping[str, Any]) -> dict[str, str]:
    """For people, what there was of: "training steps"; "teacher"; "began from", the model whose weights training took
    over; and "made of", the bundle that this one was made of."""
    sources = origin.get("sources", {})
    entries = {
        "teacher": sources.get("teacher"),
        "began from": sources.get("initialize_from"),
        "made of": origin.get("made_of"),
    }
    steps = {"training steps": f"{origin['step']:,}"} if "step" in origin else {}
    return steps | {name: _name_source(entry) for name, entry in entries.items() if entry is not None}


def _name_source(entry: Mapping[str, Any]) -> str:
    """A model that went into another: its name, how it was made, and its own history."""
    origin = entry["origin"]
    facts = [f"SHA-256 {entry['sha256']}"]
    facts += [f"recipe {origin['recipe_name']}"] if "recipe_name" in origin else []
    facts += [f"calibration SHA-256 {origin['calibration_sha256']}"] if "calibration_sha256" in origin else []
    facts += [f"made in {origin['cost']['seconds']:,} s"] if "cost" in origin else []
    facts += [f"{name} {text}" for name, text in tell_history(origin).items()]
    return f"{Path(entry['directory']).name} ({', '.join(facts)})"
