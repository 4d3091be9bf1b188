"""Graphs with kernels, lowered here for platforms that are not here: what they call, and on a CPU what they compute."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai.data.tokenizer import Tokenizer
from hsai.errors import InputError
from hsai.export import GraphConfig, write_bundle
from hsai.export.manifest import read_manifest
from hsai.export.stablehlo import count_products, export_with_kernels, find_custom_calls
from hsai.export.steps import cache_shapes, make_decode
from hsai.export.targets import TARGETS, find_target
from hsai.formats import Activations, take_activations
from hsai.formats.storage import describe, named_arrays
from hsai.infer import Engine
from hsai.infer import graphs as runtimes
from hsai_kernels.dispatch import BackendMissing
from tests.export.test_stablehlo import export, read_portable
from tests.export.tiny_models import make_model, make_shapes

CALLS = {
    "cpu": {"hsai_quantized_matmul", "hsai_quantized_matmul_of_layer", "hsai_attention"},
    "cuda": {"__gpu$xla.gpu.triton"},
}
CALLS |= {"rocm": CALLS["cuda"]} | {name: {"tpu_custom_call"} for name in TARGETS if name.startswith("tpu")}
PROMPT = np.array([3, 17, 250, 99, 41], np.int32)


@pytest.mark.parametrize("kernels", TARGETS)
def test_its_kernels_are_in_the_graph(kernels: str, tmp_path: Path) -> None:
    directory = tmp_path / "bundle"
    directory.mkdir()
    export(directory, make_model("int4"), kernels=(kernels,))
    files = sorted(path.name for path in (directory / "graphs").iterdir())
    stems = [f"{name}{suffix}" for name in ("decode", "prefill_8") for suffix in ("", f".{kernels}")]
    assert files == sorted(f"{stem}.{kind}" for stem in stems for kind in ("jax", "stablehlo"))
    called = find_custom_calls(read_portable(directory / "graphs" / f"decode.{kernels}.stablehlo"))
    assert set(called) == CALLS[kernels]
    assert find_custom_calls(read_portable(directory / "graphs" / "decode.stablehlo")) == ()


PRODUCTS = {"cpu": 5, "cuda": 8, "rocm": 8, "tpu-v5e": 8}
"""Of a token: queries, keys and values, and gate and up, are one each on a CPU; the head's is outside of the layers."""


@pytest.mark.parametrize("kernels", PRODUCTS)
@pytest.mark.parametrize(
    ("name", "activations"), [("int8", "float"), ("int4", "int8"), ("nm_int4", "float"), ("vnm_int4", "float")]
)
def test_every_product_is_a_kernels(name: str, activations: Activations, kernels: str) -> None:
    model = take_activations(make_shapes(name), activations)
    arguments = (named_arrays(model), jax.ShapeDtypeStruct((1, 1), jnp.int32), *cache_shapes(model.config, 1, 48))
    exported = export_with_kernels(make_decode(model.config, describe(model)), arguments, kernels)
    assert count_products(exported.mlir_module()) == PRODUCTS[kernels]


def test_where_only_attention_has_a_kernel_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = export(tmp_path, make_shapes("outliers"), kernels=("cpu",))
    assert records["decode"].custom_calls == ("hsai_attention",)
    assert [record.args[:2] for record in caplog.records] == [("prefill_8", "cpu"), ("decode", "cpu")]
    assert "each call rebuilds dense weights" in caplog.text


@pytest.fixture
def bundle(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    graphs = GraphConfig(prefill_buckets=(4,), kernels=("cpu", "tpu-v5e"))
    manifest = write_bundle(tmp_path / "bundle", make_model("int4"), tokenizer, graphs=graphs)
    by_kernels = {(graph.name, graph.kernels): set(graph.custom_calls) for graph in manifest.graphs}
    assert by_kernels["decode", None] == set() and by_kernels["prefill_4", "cpu"] == CALLS["cpu"]
    assert by_kernels["decode", "tpu-v5e"] == CALLS["tpu-v5e"] and len(by_kernels) == 6
    return tmp_path / "bundle"


def test_on_a_cpu_they_run_and_compute_the_same(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_target() == "cpu"

    def compute() -> tuple[np.ndarray, tuple[int, ...]]:
        engine = Engine.load(bundle, graphs=True)
        logits, cache = engine.runtime.prefill(PROMPT, engine.runtime.make_pages(1))
        after, _ = engine.runtime.decode(jnp.array([7], jnp.int32), cache)
        return np.concatenate([logits, after]), engine.generate_tokens(PROMPT.tolist(), max_tokens=8).tokens

    fast, tokens = compute()

    def be_missing() -> None:
        raise BackendMissing("not built")

    monkeypatch.setattr(runtimes, "load_library", be_missing)
    portable, same_tokens = compute()
    assert np.std(portable) > 0.3 and not np.array_equal(fast, portable)  # they were other programs
    np.testing.assert_allclose(fast, portable, atol=2e-5, rtol=2e-5)
    assert tokens == same_tokens


def test_calls_of_a_newer_library_are_left_alone(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runtimes, "NAMES", ("hsai_quantized_matmul", "hsai_attention"))
    graphs = read_manifest(bundle).graphs
    with caplog.at_level("WARNING"):
        chosen = runtimes.choose_graphs(graphs)
    assert chosen and all(graph.kernels is None for graph in chosen)
    assert "hsai_quantized_matmul_of_layer" in caplog.text and "newer hsai" in caplog.text


def test_targets_that_cannot_be_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="kernels='tpu' is unknown; valid are cpu, cuda, rocm, tpu-v5e"):
        GraphConfig(kernels=("tpu",))
    with pytest.raises(InputError, match="kernels=cpu, cpu names a target twice"):
        GraphConfig(kernels=("cpu", "cpu"))

    def be_missing() -> None:
        raise BackendMissing("not built")

    monkeypatch.setattr("hsai_kernels.native.load_library", be_missing)
    with pytest.raises(InputError, match="kernels='cpu': none of hsai's kernels for it serves graph prefill_8"):
        export(tmp_path / "bundle", make_model("int3"), kernels=("cpu",))
