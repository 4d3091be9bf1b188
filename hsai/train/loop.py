"""The training loop: from a config to a trained model, resumed wherever it was left.

A step is a pure function of the state and of the batch, and batch k a pure function of the seed and k; so a run that is
killed and started again ends in the same bits as one that was not.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh

from hsai.configuration import difference, from_dict, to_dict, to_json
from hsai.data.corpus import Corpus, build_corpus
from hsai.data.loader import Loader
from hsai.data.tokenizer import Tokenizer
from hsai.errors import InputError
from hsai.files import lock_directory
from hsai.models import Remat
from hsai.processes import agree, require_same
from hsai.progress import ProgressBar, say
from hsai.sharding import array_sharding, check_mesh, make_mesh, use_mesh
from hsai.train.checkpoint import LOCK, Checkpointer
from hsai.train.directory import is_run
from hsai.train.distill import DistillConfig, make_teacher
from hsai.train.evaluate import Quality, make_evaluation
from hsai.train.formats import FormatRule, match_formats, see_packed
from hsai.train.metrics import MetricsWriter, Throughput, describe_step
from hsai.train.optimizer import make_optimizer, make_schedule
from hsai.train.origin import (
    ModelOnDisk,
    Opener,
    check_words,
    describe_origin,
    open_origin,
    open_teacher,
    read_tokenizer,
    write_assets,
)
from hsai.train.state import TrainState, abstract_state, adopt_state, fill_signs, init_state, place_model
from hsai.train.step import Metrics, make_train_step

if TYPE_CHECKING:
    from hsai.config import RunConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    steps: int = 1000
    """Updates in all."""

    batch_size: int = 32
    """Rows of data.sequence_length tokens an update, over all devices."""

    accumulate: int = 1
    """Micro-batches into which a batch is cut; the gradient is the same, the memory for activations is divided."""

    seed: int = 0
    """Of the initial weights and of the order of the data."""

    remat: Remat = "none"
    """What the backward pass recomputes: none (fastest), all but matrix products (dots), or whole blocks (full)."""

    loss_chunk: int = 256
    """Positions of a row whose logits exist together."""

    initialize_from: Path | None = None
    """The model whose weights and tokenizer the run begins from: a run, a bundle, a checkpoint of transformers, or a
    GGUF file. None draws the weights."""

    distill: DistillConfig | None = None
    """Learns from a teacher's predictions as well."""

    formats: tuple[FormatRule, ...] = ()
    """Trains weights as if they were packed: quantized, sparse or both."""

    expert_balance: float = 0.0
    """Weight of the loss that balances the experts of each layer (2101.03961, eq. 4, has 0.01); 0 leaves it out."""

    log_every: int = 10
    """Steps between rows of metrics."""

    evaluate_every: int = 100
    """Steps between measurements on held-out text; the last step is always measured."""

    evaluate_tokens: int = 100_000
    """Held-out tokens that a measurement reads."""

    def __post_init__(self) -> None:
        names = ("steps", "batch_size", "accumulate", "loss_chunk", "log_every", "evaluate_every", "evaluate_tokens")
        for name in names:
            if getattr(self, name) < 1:
                raise InputError(f"train.{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.expert_balance < math.inf:
            raise InputError(f"train.expert_balance={self.expert_balance} must be a number that is not negative")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"train.seed={self.seed} must be between 0 and {2**32 - 1}")
        if self.batch_size % self.accumulate:
            raise InputError(
                f"train.batch_size={self.batch_size} does not divide into train.accumulate={self.accumulate} parts"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run ended with."""

    state: TrainState
    """The last state, on the mesh."""

    quality: Quality
    """On held-out text, at the last step."""

    started_at: int
    """The step that the run began or resumed at."""


# What may differ when a run is resumed: it changes where and how often, not which numbers come out.
# (Of the teacher not the place but the contents are compared.)
_FREE_TO_CHANGE = (
    "mesh.",
    "checkpoint.",
    "data.prefetch",
    "train.log_every",
    "train.evaluate_",
    "train.remat",
    "train.distill.teacher",
)


def train(run: "RunConfig", directory: Path, data_directory: Path, opener: Opener) -> TrainResult:
    """Trains `run` to its last step, from the newest checkpoint in `directory` if there is one.

    A run that is resumed needs its teacher, and no longer the model that it began from.

    Args:
      run: the experiment.
      directory: of the run: checkpoints, metrics, TensorBoard events, tokenizer.
      data_directory: of the corpus, which is built if it is not there.
      opener: reads the models that the config names (`hsai.export.source.open_model`).

    Raises:
      InputError: anything in the config, the data or the directory that cannot be used; a loss that is not finite.
    """
    require_same("config", to_json(run))
    mesh = make_mesh(run.mesh)
    check_mesh(mesh, run.model.axis_sizes)
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    say(
        f"mesh: {sizes} on {jax.device_count()} {jax.devices()[0].device_kind} devices, {jax.process_count()} processes"
    )
    # What can be refused without writing anything comes first; then the corpus, which has a directory of its own.
    check_batch(run, mesh)
    match_formats(run.train.formats, run.model)
    stored = agree(lambda: _check_stored(run, directory))
    origin = agree(lambda: open_origin(run, opener) if stored is None else None)
    teacher = agree(lambda: open_teacher(run, opener))
    tokenizer = origin.tokenizer if origin is not None else None
    if stored is not None and run.train.initialize_from is not None:
        record = stored
        tokenizer = agree(lambda: read_tokenizer(directory, record))
    with use_mesh(mesh):
        corpus = prepare_corpus(run, data_directory, tokenizer)
        if teacher is not None:
            check_words(teacher, corpus.tokenizer)
        with _exclusive(directory), Checkpointer(directory / "checkpoints", run.checkpoint) as checkpointer:
            return _train(run, directory, mesh, corpus, checkpointer, origin, teacher)


def check_batch(run: "RunConfig", mesh: Mesh) -> None:
    """Refuses a batch whose micro-batches do not divide over the mesh."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if run.train.batch_size % (parts * run.train.accumulate):
        raise InputError(
            f"train.batch_size={run.train.batch_size} does not divide by mesh data x fsdp = {parts} "
            f"times train.accumulate={run.train.accumulate}"
        )


def prepare_corpus(run: "RunConfig", data_directory: Path, tokenizer: Tokenizer | None) -> Corpus:
    """The run's corpus, cut by `tokenizer` or by one of its own; the first process builds it if need be, and the others
    wait."""

    def build() -> Corpus:
        with ProgressBar() as progress:
            return build_corpus(run.data, data_directory, progress, tokenizer=tokenizer)

    first = jax.process_index() == 0
    built = agree(lambda: build() if first else None)
    corpus = agree(lambda: build() if built is None else built)
    require_same("corpus", corpus.meta["content_sha256"])
    counts = corpus.meta["counts"]
    say(
        f"{'reusing' if corpus.reused else 'built'} corpus {data_directory}: "
        + ", ".join(f"{name} {c['files']} files {c['bytes'] / 1e6:.1f} MB" for name, c in counts.items())
    )
    return corpus


def make_loader(run: "RunConfig", corpus: Corpus, mesh: Mesh) -> Loader:
    """The run's batches, each laid out over the mesh."""
    shape = (run.train.batch_size, run.data.sequence_length)
    sharding = array_sharding(mesh, ("batch", "seq"), shape)
    return Loader(corpus, run.data, batch_size=shape[0], sharding=sharding, seed=run.train.seed)


def _train(
    run: "RunConfig",
    directory: Path,
    mesh: Mesh,
    corpus: Corpus,
    checkpointer: Checkpointer,
    origin: ModelOnDisk | None,
    teacher: ModelOnDisk | None,
) -> TrainResult:
    config = run.train
    loader = make_loader(run, corpus, mesh)
    optimizer = make_optimizer(run.optim, config.steps)
    # Each process lists the directory for itself; a file system that is late somewhere must not part them.
    require_same("newest checkpoint", str(checkpointer.latest))
    first = jax.process_index() == 0
    sources = {} if teacher is None else {"teacher": describe_origin(teacher)}
    if checkpointer.latest is not None:
        state, start, kept = _resume(run, mesh, checkpointer, corpus, sources)
        sources |= kept
        say(f"resuming {directory} at step {start} of {config.steps}")
    elif origin is not None:
        state, start = adopt_state(run.model, origin.model, optimizer, mesh, config.formats), 0
        sources["initialize_from"] = describe_origin(origin)
        agree(lambda: write_assets(origin, directory) if first else None)
        say(f"beginning from {origin.directory}")
    else:
        state, start = init_state(run.model, optimizer, mesh, config.seed, config.formats), 0
    agree(lambda: corpus.tokenizer.save(directory / "tokenizer.json") if first else None)

    shardings = jax.tree.map(lambda x: x.sharding, state)
    step_function = make_train_step(optimizer, make_schedule(run.optim, config.steps), config, shardings)
    evaluate = make_evaluation(corpus.tokenizer.token_bytes, chunk=config.loss_chunk)
    see = jax.jit(lambda model: see_packed(model, config.formats))
    tutor = None if teacher is None else place_model(make_teacher(teacher.model, run.model.dtype), mesh)
    throughput = Throughput(run.model, run.data.sequence_length, mesh.devices.flat[0], mesh.devices.size)
    record = {
        "config": to_dict(run),
        "tokenizer_sha256": hashlib.sha256(corpus.tokenizer.to_json().encode()).hexdigest(),
        "tokenizer": corpus.tokenizer.roles,
        "sources": sources,
        "corpus": corpus.meta["content_sha256"],
        "data_directory": str(corpus.directory.resolve()),
    }

    def measure() -> Quality:
        with throughput.paused():
            return evaluate(see(state.model), loader.evaluation_batches(config.evaluate_tokens))

    quality = measure() if start == config.steps else None
    with agree(lambda: MetricsWriter(directory, resume_step=start)) as writer, ProgressBar() as progress:
        logged: dict[str, float] = {}

        def settle(step: int, metrics: Metrics, measured: bool) -> None:
            """Waits for a step, and logs it."""
            nonlocal quality, logged
            row = {name: float(value) for name, value in jax.device_get(metrics).items()}
            throughput.tick(row.pop("tokens"))
            _check_finite(row, step, run, checkpointer)
            if measured:
                quality = measure()
                row |= {"heldout_loss": quality.loss, "heldout_bits_per_byte": quality.bits_per_byte}
            if measured or step % config.log_every == 0:
                logged = row | throughput.summary()
                writer.write(step, logged)
            heldout = "" if quality is None else f", held-out {quality.bits_per_byte:.3f} bits/byte"
            progress("training", step, config.steps, f"{describe_step(row, logged)}{heldout}")

        running: tuple[int, Metrics] | None = None
        for step, batch in enumerate(loader.iterate(start, config.steps), start + 1):
            state, metrics = step_function(state, batch, tutor)
            # The step before is logged while the devices work on this one; but a state that is measured or saved is
            # that of a step which is known to have gone well.
            if running is not None:
                settle(*running, measured=False)
            running = (step, metrics)
            last = step == config.steps
            measured = step % config.evaluate_every == 0 or last
            if measured or checkpointer.is_due(step):
                settle(*running, measured=measured)
                running = None
                with throughput.paused():
                    checkpointer.save(step, state, record | {"next_step": step}, force=last)
    assert quality is not None  # the last step measures
    return TrainResult(state=state, quality=quality, started_at=start)


def _resume(
    run: "RunConfig", mesh: Mesh, checkpointer: Checkpointer, corpus: Corpus, sources: dict[str, Any]
) -> tuple[TrainState, int, dict[str, Any]]:
    """The newest checkpoint, if it was made by a run that would have gone on to the same numbers; its step, and what it
    says of the models that went into it."""
    optimizer = make_optimizer(run.optim, run.train.steps)
    like = abstract_state(run.model, optimizer, mesh, run.train.seed, run.train.formats)
    record = checkpointer.read_record()
    _check_config(run, record, checkpointer.directory.parent)
    if record["corpus"] != corpus.meta["content_sha256"]:
        where = f"{checkpointer.directory.parent} holds a run of another config"
        raise InputError(f"{where}: its corpus had other text; give another --directory")
    kept = record.get("sources", {})
    for name, found in sources.items():
        if kept.get(name, {}).get("sha256") != found["sha256"]:
            raise InputError(
                f"{checkpointer.directory.parent} was trained with another {name} than {found['directory']} holds now"
            )
    return checkpointer.restore(like, fill_new=fill_signs), int(record["next_step"]), kept


def _check_stored(run: "RunConfig", directory: Path) -> dict[str, Any] | None:
    """Refuses a directory with a run of another config before any work is done; `_resume` looks at all of it again.

    Returns: the record of the newest checkpoint, None where there is none.
    """
    if not is_run(directory):
        return None
    with Checkpointer(directory / "checkpoints", None) as checkpointer:
        if checkpointer.latest is None:
            return None
        record = checkpointer.read_record(verify=False)
    _check_config(run, record, directory)
    return record


def _check_config(run: "RunConfig", record: dict[str, Any], directory: Path) -> None:
    stored = from_dict(type(run), record["config"])
    changes = [line for line in difference(run, stored) if not line.startswith(_FREE_TO_CHANGE)]
    if changes:
        raise InputError(f"{directory} holds a run of another config ({'; '.join(changes)}); give another --directory")


def _check_finite(row: dict[str, float], step: int, run: "RunConfig", checkpointer: Checkpointer) -> None:
    """Every step, so that no checkpoint is ever made of numbers that training cannot come back from."""
    saved = "no checkpoint yet" if checkpointer.latest is None else f"checkpoint {checkpointer.latest} is the newest"
    for name in ("loss", "update_norm"):
        if not math.isfinite(row[name]):
            raise InputError(
                f"{name} is {row[name]} at step {step} with optim.learning_rate={run.optim.learning_rate}; "
                f"try a lower one ({saved})"
            )


@contextmanager
def _exclusive(directory: Path) -> Iterator[None]:
    """Holds the directory for this run; a second one that is started by mistake is refused."""
    first = jax.process_index() == 0
    lock = agree(lambda: lock_directory(directory, LOCK, option="--directory") if first else None)
    with lock or nullcontext():
        yield
