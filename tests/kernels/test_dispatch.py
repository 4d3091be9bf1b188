"""dispatch.py: the automatic choice, what it logs, explicit choices, and `prefer` against jit's caches."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai_kernels import attention, dispatch, native, prefer, quantized_matmul, sparse_matmul
from hsai_kernels.dispatch import BackendMissing, check_platform, compile_for, run_kernel


@pytest.fixture(autouse=True)
def forget_reports(monkeypatch):
    monkeypatch.setattr(dispatch, "_reported", set())


def _refuse(message, kind=NotImplementedError):
    def backend(x):
        raise kind(message)

    return backend


def _backends(cpu):
    return {"cpu": cpu, "reference": lambda x: x + 1}


def _operands():
    """Integers and powers of two, so that sums are exact in any order."""
    rng = np.random.default_rng(0)
    return (
        jnp.asarray(rng.integers(-127, 128, (1, 32)), jnp.float32),
        jnp.asarray(rng.integers(-127, 128, (32, 20)), jnp.int8),
        jnp.asarray(2.0 ** rng.integers(-6, 0, (1, 20)), jnp.float32),
    )


def test_the_platforms_backend_comes_first():
    assert run_kernel("k", _backends(lambda x: x + 2), None, 0) == 2


def test_the_automatic_choice_falls_back_and_says_so_once(caplog):
    caplog.set_level(logging.INFO)
    backends = _backends(_refuse("has even numbers only"))
    assert [run_kernel("k", backends, None, 0) for _ in range(3)] == [1, 1, 1]
    assert [r.message for r in caplog.records] == ["k uses another backend than cpu: has even numbers only"]
    assert caplog.records[0].levelno == logging.INFO
    run_kernel("other", backends, None, 0)
    assert len(caplog.records) == 2


def test_a_missing_backend_is_a_warning(caplog):
    run_kernel("k", _backends(_refuse("not built", BackendMissing)), None, 0)
    assert [r.levelno for r in caplog.records] == [logging.WARNING]


def test_an_explicit_choice_never_falls_back():
    with pytest.raises(NotImplementedError, match="even numbers"):
        run_kernel("k", _backends(_refuse("has even numbers only")), "cpu", 0)
    with pytest.raises(NotImplementedError, match="1 to 8 rows"):
        sparse_matmul(
            jnp.ones((9, 32)), jnp.ones((16, 3)), jnp.zeros((1, 3), jnp.uint32), n=2, m=4, implementation="cpu"
        )


def test_other_errors_of_a_backend_are_not_hidden():
    def broken(x):
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        run_kernel("k", _backends(broken), None, 0)


def test_unknown_names_are_refused_with_the_valid_ones():
    with pytest.raises(ValueError, match="'chunked' of quantized_matmul: valid are cpu, gpu, reference, tpu"):
        quantized_matmul(*_operands(), implementation="chunked")
    q = jnp.zeros((1, 1, 1, 8))
    at = jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(ValueError, match="'cuda' of attention: valid are chunked, cpu, gpu, reference, tpu"):
        attention(q, q, q, q_positions=at, kv_positions=at, implementation="cuda")
    with pytest.raises(ValueError, match="'cuda': valid are chunked, cpu, gpu, reference"), prefer("cuda"):
        pass


def test_prefer_reference_leaves_no_custom_call_even_after_tracing_without_it():
    f = jax.jit(quantized_matmul)
    operands = _operands()
    assert native.QUANTIZED_MATMUL in f.lower(*operands).as_text()
    with prefer("reference"):
        assert native.QUANTIZED_MATMUL not in f.lower(*operands).as_text()
        text = jax.export.export(f)(*operands).mlir_module()
    assert native.QUANTIZED_MATMUL not in text
    assert native.QUANTIZED_MATMUL in f.lower(*operands).as_text()


def test_prefer_yields_to_an_explicit_choice():
    with prefer("reference"):
        text = jax.jit(lambda *a: quantized_matmul(*a, implementation="cpu")).lower(*_operands()).as_text()
    assert native.QUANTIZED_MATMUL in text


def test_a_mesh_of_several_devices_gets_the_reference():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    with jax.sharding.set_mesh(mesh):
        assert native.QUANTIZED_MATMUL not in jax.jit(quantized_matmul).lower(*_operands()).as_text()
        with pytest.raises(NotImplementedError, match="one device only, and the active mesh has 2"):
            quantized_matmul(*_operands(), implementation="cpu")


def test_each_device_of_a_mesh_runs_the_kernel_on_its_part():
    """Inside of jax.shard_map programs are for one device, once all axes of the mesh are manual."""
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=kinds, devices=jax.devices()[:4])
    x, values, scale = _operands()
    rows, columns = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec(None, "model")
    x = jnp.concatenate([x, 2 * x])
    wanted = quantized_matmul(x, values, scale)

    def spread(implementation, **axes):
        multiply = functools.partial(quantized_matmul, implementation=implementation)
        out = jax.sharding.PartitionSpec("data", "model")
        return jax.jit(
            jax.shard_map(multiply, in_specs=(rows, columns, columns), out_specs=out, check_vma=False, **axes)
        )

    with jax.set_mesh(mesh):
        found = spread("cpu")(x, values, scale)
        assert native.QUANTIZED_MATMUL in spread(None).lower(x, values, scale).as_text()
    np.testing.assert_array_equal(found, wanted)
    with jax.set_mesh(mesh), pytest.raises(NotImplementedError, match="one device only, and the active mesh has 2"):
        half = jax.shard_map(
            functools.partial(quantized_matmul, implementation="cpu"),
            in_specs=(rows, jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec()),
            out_specs=rows,
            axis_names={"data"},
            check_vma=False,
        )
        jax.jit(half)(x, values, scale)


def test_other_platforms_are_refused():
    with pytest.raises(NotImplementedError, match="tpu platform only, and jax's default platform here is cpu"):
        check_platform("tpu")


def test_programs_for_an_absent_platform_take_its_backends():
    backends = _backends(lambda x: x + 2) | {"gpu": lambda x: x + 3}
    f = jax.jit(lambda x: run_kernel("k", backends, None, x))
    assert f(0) == 2
    with compile_for("gpu"):
        assert f(0) == 3
        check_platform("gpu")
        with pytest.raises(NotImplementedError, match="cpu platform only, and jax's default platform here is gpu"):
            check_platform("cpu")
    assert f(0) == 2
    with pytest.raises(ValueError, match="'cuda': valid are cpu, gpu, tpu"), compile_for("cuda"):
        pass


def test_a_library_that_was_not_built_warns_and_tells_how_to_mend_it(monkeypatch, caplog):
    monkeypatch.setattr(native, "find_library", lambda: None)
    native.load_library.cache_clear()
    operands = _operands()
    with prefer("reference"):
        expected = quantized_matmul(*operands)
    np.testing.assert_array_equal(quantized_matmul(*operands), expected)
    quantized_matmul(*operands)
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "was not built" in caplog.text and "many times slower" in caplog.text and "pip install" in caplog.text
    with pytest.raises(BackendMissing, match="C\\+\\+17 compiler"):
        quantized_matmul(*operands, implementation="cpu")


def test_a_library_that_cannot_be_loaded_is_named(monkeypatch, tmp_path):
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(native, "find_library", lambda: str(broken))
    native.load_library.cache_clear()
    with pytest.raises(BackendMissing, match="_native.so cannot be used"):
        native.load_library()
