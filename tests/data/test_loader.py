"""The loader: global batches, whatever the mesh, that resume exactly and evaluate every token once."""

import dataclasses
import json
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from hsai.data.corpus import Corpus, DataConfig
from hsai.data.loader import Loader
from hsai.data.order import window_indices
from hsai.data.packing import Batch, pack_windows
from hsai.errors import InputError

FIELDS = [field.name for field in dataclasses.fields(Batch)]
MESHES = [
    ((8,), ("data",), ("data",)),
    ((4, 2), ("data", "model"), ("data",)),
    ((2, 4), ("data", "seq"), ("data", "seq")),
]


def make_sharding(shape: tuple[int, ...], axes: tuple[str, ...], spec: tuple[str, ...]) -> NamedSharding:
    types = (jax.sharding.AxisType.Auto,) * len(axes)
    return NamedSharding(jax.make_mesh(shape, axes, axis_types=types), PartitionSpec(*spec))


def make_loader(corpus: Corpus, config: DataConfig, seed: int = 3, batch_size: int = 8) -> Loader:
    return Loader(corpus, config, batch_size=batch_size, sharding=make_sharding(*MESHES[0]), seed=seed)


def same(first: Batch, second: Batch) -> bool:
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in FIELDS)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_batch_is_its_windows_under_any_mesh(corpus: Corpus, config: DataConfig, mesh: tuple):
    sharding = make_sharding(*mesh)
    loader = Loader(corpus, config, batch_size=8, sharding=sharding, seed=3)
    batch = loader.batch(5)
    expected = pack_windows(corpus.train, window_indices(3, 5, 8, loader.window_count), 16, corpus.tokenizer.eot)
    assert same(batch, expected)
    for name in FIELDS:
        array = getattr(batch, name)
        assert array.sharding == sharding and array.shape == (8, 16)
        assert array.dtype == getattr(expected, name).dtype


def test_one_device(corpus: Corpus, config: DataConfig):
    sharding = SingleDeviceSharding(jax.devices()[1])
    batch = Loader(corpus, config, batch_size=8, sharding=sharding, seed=3).batch(0)
    assert same(batch, make_loader(corpus, config).batch(0)) and batch.tokens.devices() == {jax.devices()[1]}


def test_resuming_sees_what_an_uninterrupted_run_sees(corpus: Corpus, config: DataConfig):
    whole = list(make_loader(corpus, config).iterate(0, 20))
    resumed = list(make_loader(corpus, config).iterate(7, 20))
    assert len(whole) == 20 and len(resumed) == 13
    assert all(same(a, b) for a, b in zip(whole[7:], resumed, strict=True))
    assert same(make_loader(corpus, config).batch(7), whole[7])


def test_prefetch_depth_changes_nothing_but_time(corpus: Corpus, config: DataConfig):
    shallow = make_loader(corpus, dataclasses.replace(config, prefetch=1)).iterate(0, 5)
    deep = make_loader(corpus, dataclasses.replace(config, prefetch=9)).iterate(0, 5)
    assert all(same(a, b) for a, b in zip(shallow, deep, strict=True))


@pytest.mark.parametrize("depth", [1, 4])
def test_prefetch_reads_no_further_ahead_than_configured(
    corpus: Corpus, config: DataConfig, depth: int, monkeypatch: pytest.MonkeyPatch
):
    loader = make_loader(corpus, dataclasses.replace(config, prefetch=depth))
    read: list[int] = []
    original = loader.batch
    monkeypatch.setattr(loader, "batch", lambda step: (read.append(step), original(step))[1])
    iterator = loader.iterate(0, 100)
    next(iterator)
    next(iterator)
    iterator.close()
    assert 2 <= len(read) <= 2 + depth


def test_seeds_and_steps_differ(corpus: Corpus, config: DataConfig):
    loader = make_loader(corpus, config)
    assert not same(loader.batch(0), loader.batch(1))
    assert not same(loader.batch(0), make_loader(corpus, config, seed=4).batch(0))


def test_an_epoch_is_the_training_stream(corpus: Corpus, config: DataConfig):
    loader = make_loader(corpus, config)
    steps = -(-loader.window_count // 8)
    rows = np.concatenate([np.asarray(loader.batch(step).targets) for step in range(steps)])[: loader.window_count]
    order = np.concatenate([window_indices(3, step, 8, loader.window_count) for step in range(steps)])
    restored = rows[np.argsort(order[: loader.window_count])].reshape(-1)
    assert np.array_equal(restored, corpus.train[1 : len(restored) + 1])


@pytest.mark.parametrize("batch_size", [8, 64])
@pytest.mark.parametrize("max_tokens", [None, 1, 16, 100])
def test_evaluation_counts_every_target_once(
    corpus: Corpus, config: DataConfig, batch_size: int, max_tokens: int | None
):
    batches = list(make_loader(corpus, config, batch_size=batch_size).evaluation_batches(max_tokens))
    assert all(batch.tokens.shape == (batch_size, 16) for batch in batches)
    targets = np.concatenate([np.asarray(batch.targets).reshape(-1) for batch in batches])
    weights = np.concatenate([np.asarray(batch.weights).reshape(-1) for batch in batches])
    assert np.array_equal(targets[weights == 1], corpus.heldout[1:][:max_tokens])
    assert set(np.unique(weights)) <= {0.0, 1.0}
    assert all(np.asarray(batch.weights).any() for batch in batches)


def test_sizes_that_cannot_be(corpus: Corpus, config: DataConfig):
    with pytest.raises(InputError, match="batch_size=6 does not divide over the 8 parts of mesh axes data"):
        make_loader(corpus, config, batch_size=6)
    with pytest.raises(InputError, match="batch_size=0"):
        make_loader(corpus, config, batch_size=0)
    odd = dataclasses.replace(config, sequence_length=18)
    with pytest.raises(InputError, match="data.sequence_length=18 does not divide over the 4 parts"):
        Loader(corpus, odd, batch_size=8, sharding=make_sharding(*MESHES[2]), seed=0)
    with pytest.raises(InputError, match=f"at most {len(corpus.train) - 1} is valid"):
        make_loader(corpus, dataclasses.replace(config, sequence_length=len(corpus.train)))
    with pytest.raises(InputError, match="max_tokens=0"):
        next(make_loader(corpus, config).evaluation_batches(0))
    with pytest.raises(ValueError, match="start_step=3 must be between 0 and stop_step=2"):
        make_loader(corpus, config).iterate(3, 2)


PROCESS = """
import json, sys
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from hsai.data import loader as module
from hsai.data.corpus import DataConfig
from hsai.data.corpus_files import open_corpus

directory, address, process, length = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(address, num_processes=2, process_id=process)
read = []
original = module.pack_windows
module.pack_windows = lambda stream, rows, *rest: (read.extend(rows.tolist()), original(stream, rows, *rest))[1]
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
sharding = NamedSharding(mesh, PartitionSpec("data"))
config = DataConfig(sequence_length=length)
loader = module.Loader(open_corpus(directory), config, batch_size=8, sharding=sharding, seed=3)
tokens = loader.batch(5).tokens
shards = sorted(tokens.addressable_shards, key=lambda shard: shard.index[0].start or 0)
rows = np.concatenate([np.asarray(shard.data) for shard in shards])
print(json.dumps({"shape": tokens.shape, "read": read, "rows": rows.tolist()}))
"""


def test_two_processes_read_their_own_rows(corpus: Corpus, config: DataConfig, tmp_path: Path):
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    root = Path(__file__).parents[2]
    environment = {"PYTHONPATH": f"{root}:{root / 'kernels'}", "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(corpus.directory), address, str(index), str(config.sequence_length)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    found = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in processes]
    expected = make_loader(corpus, config).batch(5)
    indices = window_indices(3, 5, 8, make_loader(corpus, config).window_count)
    for index, result in enumerate(found):
        mine = slice(4 * index, 4 * index + 4)
        assert result["shape"] == [8, config.sequence_length]
        assert np.array_equal(result["rows"], np.asarray(expected.tokens)[mine])
        assert sorted(result["read"]) == sorted(indices[mine].tolist())
