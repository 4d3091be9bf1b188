"""Training runs as models (`hsai.export.source`); apart from it, since what trains takes longest to import."""

from pathlib import Path
from typing import Any

from hsai.config import RunConfig
from hsai.configuration import from_dict, to_dict
from hsai.data.assets import read_assets
from hsai.export.source import ModelRecord, ModelSource, join_digests, list_asset_paths
from hsai.files import sha256
from hsai.train.checkpoint import Checkpointer
from hsai.train.restore import read_run
from hsai.train.seal import SEAL


def inspect_run(directory: Path) -> ModelRecord:
    """The record of a run's newest checkpoint; raises as `hsai.export.source.inspect_model`."""
    with Checkpointer(directory / "checkpoints", None) as checkpointer:
        record = checkpointer.read_record()
    run = from_dict(RunConfig, record["config"])
    return _record_run(directory, run, int(record["next_step"]), record["data_directory"], record.get("sources", {}))


def open_run(directory: Path) -> ModelSource:
    """A run's newest checkpoint; raises as `hsai.export.source.open_model`."""
    trained = read_run(directory)
    record = _record_run(directory, trained.run, trained.step, str(trained.data_directory), trained.sources)
    assets = read_assets(directory)
    return ModelSource(**vars(record), model=trained.model, tokenizer=trained.tokenizer, assets=assets)


def _record_run(
    directory: Path, run: RunConfig, step: int, data_directory: str, sources: dict[str, Any]
) -> ModelRecord:
    origin = {
        "run": directory.name,
        "step": step,
        "corpus": data_directory,
        "sequence_length": run.data.sequence_length,
        "training": to_dict(run),
    }
    origin |= {"sources": sources} if sources else {}
    parts = (directory / "checkpoints" / str(step) / SEAL, directory / "tokenizer.json", *list_asset_paths(directory))
    digest = join_digests(*(sha256(part) for part in parts))
    return ModelRecord(directory=directory, config=run.model, origin=origin, sha256=digest)
