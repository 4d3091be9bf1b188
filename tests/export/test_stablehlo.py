"""Graphs: portable, small whatever the model's size, and with the calling convention that the manifest states."""

import dataclasses
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from hsai.errors import InputError
from hsai.export import GraphConfig, GraphRecord, export_graphs, load_graph
from hsai.export.stablehlo import PLATFORMS, export_step, find_custom_calls
from hsai.export.steps import cache_shapes, make_decode, make_prefill
from hsai.formats.storage import describe, named_arrays
from hsai.models import Transformer
from hsai.sharding import MeshConfig, make_mesh, use_mesh
from tests.export.tiny_models import FORMATS, full_logits, make_config, make_model, make_shapes

SIZE_CAP = 64 * 1024
"""Bytes that a graph may have, whatever the size of the model: the scan over layers holds one block."""

DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "i32": "int32", "ui32": "uint32", "i8": "int8"}


def export(directory: Path, model: Transformer, **options: Any) -> dict[str, GraphRecord]:
    """The records of a model's graphs, by name."""
    directory.mkdir(exist_ok=True)
    config = GraphConfig(**{"prefill_buckets": (8,), **options})
    records = export_graphs(directory, model.config, describe(model), named_arrays(model), config)
    return {record.name: record for record in records}


def read_portable(path: Path) -> str:
    """The text of a portable StableHLO artifact, read by StableHLO itself."""
    context = ir.Context()
    stablehlo.register_dialect(context)
    with context:
        module = stablehlo.deserialize_portable_artifact(context, path.read_bytes())
        return str(module)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """A model, and where its graphs are."""

    model: Transformer
    directory: Path
    records: dict[str, GraphRecord]


@pytest.fixture(scope="module", params=FORMATS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Graphs of a small model in each format, made from its shapes."""
    directory, model = tmp_path_factory.mktemp("exported"), make_shapes(request.param)
    return Exported(model=model, directory=directory, records=export(directory, model))


@pytest.fixture
def exported_sizes(tmp_path: Path) -> Callable[[Transformer], dict[str, int]]:
    """Exports a model; the bytes of each graph file by its name, and of the weights."""

    def measure(model: Transformer) -> dict[str, int]:
        directory = Path(tempfile.mkdtemp(dir=tmp_path))
        export(directory, model)
        weights = sum(array.size * array.dtype.itemsize for array in named_arrays(model).values())
        return {"weights": weights, **{path.name: path.stat().st_size for path in directory.glob("graphs/*")}}

    return measure


def test_portable_graphs_hold_no_custom_call(exported: Exported) -> None:
    directory, records = exported.directory, exported.records
    for record in records.values():
        assert record.custom_calls == ()
        text = read_portable(directory / record.stablehlo_file)
        assert "stablehlo.dot_general" in text and "custom_call" not in text
        assert "custom_call" not in load_graph(directory, record).mlir_module()


def test_custom_calls_are_found() -> None:
    matrix = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    module = jax.export.export(jax.jit(jnp.linalg.cholesky), platforms=("cpu",))(matrix).mlir_module()
    assert find_custom_calls(module) == ("lapack_spotrf_ffi",)
    generic = '%0 = "stablehlo.custom_call"(%1) {call_target_name = "hsai.quantized_matmul"} : tensor<f32>'
    assert find_custom_calls(generic) == ("hsai.quantized_matmul",)


@pytest.mark.parametrize("format_name", FORMATS)
def test_one_portable_module_serves_every_platform(format_name: str) -> None:
    model = make_shapes(format_name)
    arguments = (named_arrays(model), jax.ShapeDtypeStruct((1, 1), jnp.int32), *cache_shapes(model.config, 1, 48))
    step = make_decode(model.config, describe(model))
    modules = {export_step(step, arguments, (platform,)).mlir_module_serialized for platform in PLATFORMS}
    assert len(modules) == 1


def test_manifest_states_the_calling_convention_of_the_module(exported: Exported) -> None:
    directory, records = exported.directory, exported.records
    assert set(records) == {"prefill_8", "decode"}
    for record in records.values():
        text = read_portable(directory / record.stablehlo_file)
        signature = re.search(r"func\.func public @main\((.*?)\) -> \((.*?)\) \{\n", text)
        assert signature is not None
        for part, stated in zip(signature.groups(), (record.inputs, record.outputs), strict=True):
            types = re.findall(r"tensor<((?:\d+x)*)(\w+)>", part)
            found = [(tuple(int(n) for n in shape.split("x")[:-1]), DTYPES[dtype]) for shape, dtype in types]
            assert found == [(array.shape, array.dtype) for array in stated]
        cache = ["keys", "values", "lengths"]
        called = ["tokens", "count"] if record.step == "prefill" else ["tokens"]
        names = [array.name for array in record.inputs]
        assert names[-len(called + cache) :] == called + cache
        assert names[: -len(called + cache)] == sorted(names[: -len(called + cache)])
        assert [array.name for array in record.outputs] == ["logits", *cache]


def test_donated_inputs_are_aliased_in_the_module(exported: Exported) -> None:
    directory, records = exported.directory, exported.records
    for record in records.values():
        arguments = re.split(r"%arg\d+: ", read_portable(directory / record.stablehlo_file).split(") -> (")[0])[1:]
        aliased = {i: re.search(r"tf\.aliasing_output = (\d+)", text) for i, text in enumerate(arguments)}
        pairs = {i: int(found[1]) for i, found in aliased.items() if found}
        assert tuple(pairs) == record.donated
        for index, output in pairs.items():
            assert record.inputs[index].name == record.outputs[output].name


@pytest.mark.parametrize("format_name", FORMATS)
def test_size_does_not_grow_with_the_model(
    format_name: str, exported_sizes: Callable[[Transformer], dict[str, int]]
) -> None:
    small = exported_sizes(make_shapes(format_name))
    large = exported_sizes(
        make_shapes(format_name, embed=1024, layers=24, heads=32, kv_heads=8, mlp=4096, vocab=32_000)
    )
    assert large["weights"] > 500 * small["weights"]
    assert max(size for name, size in large.items() if name != "weights") < SIZE_CAP
    for name in small.keys() - {"weights"}:
        # The numbers in the shapes are all that may differ.
        assert abs(large[name] - small[name]) < 1024, name


def test_equal_models_give_equal_graphs_without_paths(exported: Exported, tmp_path: Path) -> None:
    directory, records = exported.directory, exported.records
    again = export(tmp_path, exported.model)
    assert again == records
    for record in records.values():
        for name in (record.jax_file, record.stablehlo_file):
            content = (directory / name).read_bytes()
            assert (tmp_path / name).read_bytes() == content
            assert b".py" not in content


def test_rows_of_a_batch_are_read_apart(tmp_path: Path) -> None:
    """Three rows with 8, 3 and 0 tokens, then one more token each: every row as if it were alone."""
    model = make_model("int8")
    records = export(tmp_path, model, batch=3, context=16)
    assert records["decode"].batch == 3 and records["decode"].slots == 16
    weights, cache = named_arrays(model), model.make_cache(3, 16)
    tokens = np.random.default_rng(0).integers(0, 512, (3, 8)).astype(np.int32)
    count = np.array([8, 3, 0], np.int32)
    state = (cache.keys, cache.values, cache.lengths)
    logits, *state = load_graph(tmp_path, records["prefill_8"]).call(weights, tokens, count, *state)
    np.testing.assert_array_equal(state[2], count)
    for row in (0, 1):
        expected = full_logits(model, tokens[row, : count[row]])[-1]
        np.testing.assert_allclose(logits[row], expected, atol=2e-5, rtol=2e-5)
    following = np.array([[5], [6], [7]], np.int32)
    logits, *state = load_graph(tmp_path, records["decode"]).call(weights, following, *state)
    np.testing.assert_array_equal(state[2], count + 1)
    for row in range(3):
        expected = full_logits(model, np.append(tokens[row, : count[row]], following[row]))[-1]
        np.testing.assert_allclose(logits[row], expected, atol=2e-5, rtol=2e-5)


def test_graphs_are_not_exported_for_a_mesh(tmp_path: Path) -> None:
    model = make_shapes("dense")
    with use_mesh(make_mesh(MeshConfig())), pytest.raises(RuntimeError, match="outside of use_mesh"):
        export(tmp_path, model)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("bound", "version"), [("minimum", 99), ("maximum", 1)])
def test_graph_of_another_jax_is_refused(
    bound: str, version: int, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax.export, f"{bound}_supported_calling_convention_version", version)
    message = rf"decode.jax has version \d+ of jax's calling convention, and jax {re.escape(jax.__version__)} runs"
    with pytest.raises(InputError, match=message):
        load_graph(exported.directory, exported.records["decode"])


def test_an_input_that_the_step_ignores_is_a_defect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make_careless(config: Any, formats: Any) -> Any:
        def prefill(
            weights: Any,
            tokens: Any,
            count: Any,
            keys: Any,
            values: Any,
            lengths: Any,
            key_scales: Any = None,
            value_scales: Any = None,
        ) -> Any:
            cache = (keys, values, lengths, key_scales, value_scales)
            return make_prefill(config, formats)(weights, tokens, jnp.full_like(count, 8), *cache)

        return prefill

    monkeypatch.setattr("hsai.export.stablehlo.make_prefill", make_careless)
    with pytest.raises(RuntimeError, match="graph prefill_8 does not read its input 'count'"):
        export(tmp_path, make_shapes("dense"))


def test_buckets_are_cut_to_the_context() -> None:
    model = make_config(max_length=100)
    assert GraphConfig().buckets(model) == (32, 100)
    assert GraphConfig(prefill_buckets=(64, 8, 64)).buckets(model) == (8, 64)
    assert GraphConfig(prefill_buckets=(64,), context=10).buckets(model) == (10,)
    assert GraphConfig().slots(model) == 100
    assert GraphConfig(context=10).slots(model) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefill_buckets": ()}, r"prefill_buckets=\(\) is empty"),
        ({"prefill_buckets": (8, 0)}, "prefill_buckets: 0 must be at least 1"),
        ({"batch": 0}, "batch=0 must be at least 1"),
        ({"context": 0}, "context=0 must be at least 1"),
    ],
)
def test_graphs_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GraphConfig(**options)


@pytest.mark.parametrize("version", ["1.0.0", "1.8.0"])
def test_a_chosen_version_is_written(version: str, tmp_path: Path) -> None:
    directory = tmp_path / "bundle"
    for record in export(directory, make_model("int4"), stablehlo_version=version).values():
        content = (directory / record.stablehlo_file).read_bytes()
        assert record.stablehlo_version == version and f"StableHLO_v{version}".encode() in content[:40]
        assert "stablehlo.dot_general" in read_portable(directory / record.stablehlo_file)


@pytest.mark.parametrize("version", ["0.8.0", "99.0.0", "one", "1.0", "1.0.0.0", ""])
def test_a_version_that_cannot_be_written_is_refused(version: str) -> None:
    with pytest.raises(InputError, match=r"stablehlo_version='.*' cannot be written; valid are 0\.9\.0 to"):
        GraphConfig(stablehlo_version=version)
