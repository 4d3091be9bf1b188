"""`bench_kernels.py --tune`: under which keys tiles are searched and stored, and that models find them there.

No accelerator is here: programs are traced for one, which is when kernels choose their tiles, and go no further.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from hsai.data.packing import Batch
from hsai.models import Transformer, TransformerConfig
from hsai.models.transformer import abstract_transformer
from hsai.train.step import batch_loss
from hsai_kernels import tuning
from hsai_kernels.dispatch import compile_for
from hsai_kernels.ops.cross_entropy import summed
from hsai_kernels.tuning import Key, record_tiles
from tests.export.tiny_models import make_shapes

ROOT = Path(__file__).resolve().parent.parent
DEVICES = {"gpu": "NVIDIA H100 80GB HBM3", "tpu": "TPU v5 lite"}


class Absent:
    """What a program for a device that is not there is lowered and compiled to."""

    def compile(self) -> Any:
        return lambda *operands: jnp.zeros(())


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The script, with few and small products, each of one weight; tiles go to a folder of the test's."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import bench_kernels
    from bench import products, programs

    formats = [row for row in products.FORMATS if row[0] in ("int4", "int8 x int4")]
    monkeypatch.setattr(products, "FORMATS", formats)
    monkeypatch.setattr(products, "SHAPES", ((256, 128),))
    monkeypatch.setattr(programs, "find_cache_size", lambda: 1)
    monkeypatch.setattr(tuning, "FOLDER", tmp_path / "tuned")
    return bench_kernels


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A device that programs are traced for."""

    def call_nothing(kernel: Any, *, out_shape: Any, **options: Any) -> Any:
        """Tiles are chosen before, and to trace kernels takes long."""
        return lambda *operands: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out_shape)

    monkeypatch.setattr(pl, "pallas_call", call_nothing)
    monkeypatch.setattr(jax.stages.Traced, "lower", lambda self, **options: Absent())
    jax.clear_caches()  # what another test traced would record no tiles
    with compile_for(request.param, DEVICES[request.param]):
        yield request.param
    jax.clear_caches()  # nothing else is to run what calls no kernels


def run_script(bench: Any, monkeypatch: pytest.MonkeyPatch, *ops: str) -> None:
    """`bench_kernels.py --tune --quick`, beside no ceiling."""
    from bench import timing

    nothing: Any = None
    ceilings = timing.Ceilings(read=nothing, multiply=nothing, multiply_integers=None)
    monkeypatch.setattr(bench, "make_ceilings", lambda: ceilings)
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--tune", "--quick", "--ops", *ops])
    bench.main()


def trace_training(embed: int) -> set[Key]:
    """The keys that training a model of the default dtype looks up."""
    sizes: Any = dict(vocab=512, embed=embed, layers=1, heads=4, kv_heads=2, head_dim=64, mlp=512, max_length=1024)
    ids = jax.ShapeDtypeStruct((1, 1024), jnp.int32)
    batch = Batch(
        tokens=ids, targets=ids, positions=ids, segments=ids, weights=jax.ShapeDtypeStruct(ids.shape, "float32")
    )

    def lose(model: Transformer, batch: Batch) -> jax.Array:
        return batch_loss(model, batch, chunk=1024)[0]

    with record_tiles() as used:
        jax.eval_shape(jax.grad(lose), abstract_transformer(TransformerConfig(**sizes)), batch)
    return {use.key for use in used}


def trace_inference(head_dim: int, tokens: int) -> set[Key]:
    """The keys that reading `tokens` into a cache looks up, in int4 and the default dtype."""
    sizes: Any = dict(heads=2, kv_heads=1, head_dim=head_dim, max_length=4096, dtype=TransformerConfig.dtype)

    def read(model: Transformer) -> jax.Array:
        ids = jnp.zeros((1, tokens), jnp.int32)
        return model.logits(model(ids, cache=model.make_cache(1))[0])

    with record_tiles() as used:
        jax.eval_shape(read, make_shapes("int4", **sizes))
    return {use.key for use in used}


def test_cases_have_the_tiles_that_a_model_looks_up(bench: Any, device: str) -> None:
    with record_tiles() as used:
        for op in ("decode", "prefill", "attention", "cross_entropy"):
            for case in bench.OPS[op](True):
                assert "bfloat16 activations" in case.name and not case.integer
                assert not any("float32" in peer.name for peer in case.peers)
                case.ours.build()
    searched = {use.key for use in used}
    for wanted in (trace_training(256), trace_inference(128, 1), trace_inference(128, 128)):
        assert wanted and wanted <= searched
        # What makes logits answers in float32, of activations that are float32 for it.
        assert {kernel for kernel, dtype, _ in wanted if dtype != "bfloat16"} <= {"quantized_matmul int4"}


def test_the_ceiling_of_an_accelerator_is_that_of_bfloat16(bench: Any, device: str) -> None:
    ceilings = bench.make_ceilings()
    assert ceilings.multiply.runner.name == "XLA's bfloat16 product" and ceilings.multiply_integers is None


def test_on_a_cpu_activations_are_float32(bench: Any) -> None:
    case = next(bench.OPS["decode"](True))
    assert case.name == "int4 1x256x128" and case.peers[0].name == "xla float32"
    assert bench.make_ceilings().multiply.runner.name == "XLA's float32 product"


@pytest.mark.parametrize("device", ["tpu"], indirect=True)
def test_fused_layers_are_tuned(bench: Any, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that is made up blocks of 128 rows are the fastest, where the kernels' own have 512."""
    now = 0.0

    def compile_last(lowered: Absent) -> Any:
        rows = used[-1].tile["rows"]
        jax.clear_caches()  # what is traced again says its tile again

        def run(*operands: Any) -> Any:
            nonlocal now
            now += 1 + abs(rows - 128)
            return operands

        return run

    monkeypatch.setattr(Absent, "compile", compile_last)
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    with record_tiles() as used:
        run_script(bench, monkeypatch, "gated_mlp", "norm_matmul")
    stored = json.loads((tuning.FOLDER / "tpu_v5_lite.json").read_text())["tiles"]
    assert [(entry["kernel"], entry["dtype"], entry["shape"]) for entry in stored] == [
        ("gated_mlp", "bfloat16", "D 256"),
        ("norm_matmul", "bfloat16", "D 256"),
    ]
    assert [entry["tile"]["rows"] for entry in stored] == [128, 128]


def test_tuning_stores_tiles_where_kernels_find_them(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the processor here, and by its own clock: the kernel's own tile is one that any other beats."""
    monkeypatch.setattr(summed, "BLOCK_TOKENS", 4)
    run_script(bench, monkeypatch, "cross_entropy", "rope")
    key = "cross_entropy_sum chunked", "float32", "D 256"
    device = tuning.name_device()
    stored = json.loads((tuning.FOLDER / f"{device}.json").read_text())
    assert [entry["kernel"] for entry in stored["tiles"]] == [key[0]] and "--tune --quick" in stored["command"]
    assert stored["tiles"][0]["tile"]["tokens"] > 4
    said = capsys.readouterr().out
    assert "tiles as they were" in said and "no kernel of it asks for a tile" in said
    with record_tiles() as used:
        jax.clear_caches()
        next(bench.OPS["cross_entropy"](True)).ours.build()
    assert {use.key: use.asked for use in used} == {key: stored["tiles"][0]["tile"]}
