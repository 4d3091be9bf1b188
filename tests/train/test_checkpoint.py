"""Checkpoints: what is saved comes back bit for bit on any mesh, and what cannot be used is refused in one line."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai.compress.latent import Latent
from hsai.errors import InputError
from hsai.files import read_json
from hsai.formats import Int4Config
from hsai.formats.storage import named_arrays
from hsai.models import TransformerConfig
from hsai.sharding import MeshConfig, make_mesh
from hsai.train.checkpoint import CheckpointConfig, Checkpointer
from hsai.train.formats import FormatRule
from hsai.train.optimizer import OptimizerConfig, make_optimizer
from hsai.train.seal import SEAL
from hsai.train.state import TrainState, abstract_state, fill_signs, init_state
from tests.train.batches import MODEL, SMALL

OPTIMIZER = make_optimizer(OptimizerConfig(warmup_steps=2), 10)
RECORD = {"next_step": 3, "text": "é"}


def mesh_of(data: int, fsdp: int, model: int) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(data=data, fsdp=fsdp, model=model), jax.devices()[: data * fsdp * model])


def fresh(seed: int, mesh: jax.sharding.Mesh) -> TrainState:
    return init_state(MODEL, OPTIMIZER, mesh, seed)


@pytest.fixture(scope="module")
def state() -> TrainState:
    """On 8 devices, each holding an eighth of the matrices."""
    return fresh(0, mesh_of(2, 2, 2))


@pytest.fixture(scope="module")
def original(state: TrainState, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the checkpoint of step 3."""
    directory = tmp_path_factory.mktemp("checkpoints")
    with Checkpointer(directory, CheckpointConfig(every=3)) as checkpointer:
        assert checkpointer.save(3, state, RECORD)
    return directory


@pytest.fixture
def saved(original: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(original, tmp_path / "checkpoints"))


def assert_same(found: TrainState, wanted: TrainState) -> None:
    found_arrays, wanted_arrays = jax.device_get(named_arrays(found)), jax.device_get(named_arrays(wanted))
    assert list(found_arrays) == list(wanted_arrays)
    for name, array in wanted_arrays.items():
        assert found_arrays[name].dtype == array.dtype
        assert found_arrays[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 1), (1, 8, 1), (1, 1, 4)])
def test_every_mesh_reads_the_same_bits(sizes: tuple[int, int, int], original: Path, state: TrainState) -> None:
    like = abstract_state(MODEL, OPTIMIZER, mesh_of(*sizes), 0)
    with Checkpointer(original, None) as checkpointer:
        assert checkpointer.latest == 3
        assert checkpointer.read_record() == RECORD
        found = checkpointer.restore(like)
    assert_same(found, state)
    for array, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(like), strict=True):
        assert array.sharding == wanted.sharding


def test_a_part_is_read_alone(original: Path, state: TrainState) -> None:
    like = abstract_state(MODEL, OPTIMIZER, mesh_of(1, 1, 1), 0).model
    with Checkpointer(original, None) as checkpointer:
        model = checkpointer.restore(like, prefix="model.")
    wanted = jax.device_get(named_arrays(state.model))
    for name, array in jax.device_get(named_arrays(model)).items():
        assert array.tobytes() == wanted[name].tobytes(), name


def test_what_is_due_is_saved_and_the_newest_are_kept(tmp_path: Path) -> None:
    mesh = mesh_of(1, 1, 1)
    with Checkpointer(tmp_path, CheckpointConfig(every=2, keep=2)) as checkpointer:
        assert checkpointer.latest is None
        done = [step for step in range(1, 8) if checkpointer.save(step, fresh(step, mesh), {"step": step})]
        assert done == [2, 4, 6]
        assert checkpointer.save(7, fresh(7, mesh), {"step": 7}, force=True)
        assert not checkpointer.save(7, fresh(8, mesh), {"step": 8}, force=True)  # it is there already
    with Checkpointer(tmp_path, None) as checkpointer:
        assert checkpointer.latest == 7
        like = abstract_state(MODEL, OPTIMIZER, mesh, 0)
        for step in (6, 7):
            assert checkpointer.read_record(step) == {"step": step}
            assert_same(checkpointer.restore(like, step), fresh(step, mesh))
        with pytest.raises(InputError, match=r"no checkpoint of step 4 in .*; there are: \[6, 7\]"):
            checkpointer.restore(like, 4)


def test_saving_goes_on_beside_the_next_step_and_keeps_what_was_handed_over(tmp_path: Path) -> None:
    """The state is donated to the next step at once; what is written must be what it was when `save` was called."""
    mesh = mesh_of(1, 2, 1)
    double = jax.jit(lambda state: jax.tree.map(lambda x: x * 2, state), donate_argnums=0)
    state, wanted = fresh(0, mesh), fresh(0, mesh)
    with Checkpointer(tmp_path, CheckpointConfig(every=1, keep=9)) as checkpointer:
        for step in range(1, 4):
            checkpointer.save(step, state, {})
            state = double(state)
    with Checkpointer(tmp_path, None) as checkpointer:
        like = abstract_state(MODEL, OPTIMIZER, mesh, 0)
        for step in range(1, 4):
            assert_same(checkpointer.restore(like, step), wanted)
            wanted = double(wanted)


def test_what_a_killed_run_was_writing_is_no_checkpoint(saved: Path) -> None:
    """Until Orbax has renamed it, it stands under a temporary name, however complete; the next save clears it away."""
    torn = saved / "6.orbax-checkpoint-tmp"
    shutil.copytree(saved / "3", torn)
    (torn / "commit_success.txt").unlink()
    with Checkpointer(saved, None) as checkpointer:
        assert checkpointer.latest == 3
    assert torn.exists()  # who only reads changes nothing
    with Checkpointer(saved, CheckpointConfig(every=3)) as checkpointer:
        assert checkpointer.latest == 3
        assert checkpointer.save(6, fresh(6, mesh_of(1, 1, 1)), RECORD)
    assert sorted(path.name for path in saved.iterdir()) == ["3", "6"]


def test_every_file_of_a_checkpoint_is_under_the_seal(original: Path) -> None:
    """All but what Orbax writes after the seal, which holds no data."""
    found = {path.relative_to(original / "3").as_posix() for path in (original / "3").rglob("*") if path.is_file()}
    unsealed = found - set(read_json(original / "3" / SEAL)["files"]) - {SEAL}
    assert {Path(name).name for name in unsealed} <= {"_CHECKPOINT_METADATA", "commit_success.txt"}
    assert any(name.startswith("state/") for name in found) and any(name.startswith("record/") for name in found)


def largest_file(directory: Path) -> Path:
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("damage", ["flipped", "cut", "removed"])
def test_damaged_data_is_refused_and_the_remedy_works(damage: str, saved: Path, state: TrainState) -> None:
    like = abstract_state(MODEL, OPTIMIZER, mesh_of(1, 1, 1), 0)
    shutil.copytree(saved / "3", saved / "6")
    path = largest_file(saved / "6")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flipped" else content[:-1])
    with Checkpointer(saved, None) as checkpointer:
        for read in (checkpointer.read_record, lambda: checkpointer.restore(like)):
            with pytest.raises(InputError, match="checkpoint 6 cannot be used") as caught:
                read()
            assert str(path) in str(caught.value) and "\n" not in str(caught.value)
            assert f"remove {saved / '6'}" in str(caught.value)
    shutil.rmtree(saved / "6")
    with Checkpointer(saved, None) as checkpointer:
        assert_same(checkpointer.restore(like), state)


def test_a_model_of_another_form_is_refused_by_name(original: Path) -> None:
    mesh = mesh_of(1, 1, 1)
    cases = (
        ({"mlp": 192}, r"array '.*mlp\..*' is \[2, .*\], not \[2, .*\]"),
        ({"qk_norm": True}, r"array '.*attention\.._norm\.gain' is missing"),
        ({"tie_embeddings": False}, r"array '.*unembed' is missing"),
    )
    with Checkpointer(original, None) as checkpointer:
        for change, message in cases:
            model = TransformerConfig(**SMALL | change)
            with pytest.raises(InputError, match=f"does not fit: {message}"):
                checkpointer.restore(abstract_state(model, OPTIMIZER, mesh, 0))
        like = {"model": {"final_norm": {"gain": jnp.zeros(64)}}}
        with pytest.raises(InputError, match="is unknown to this model"):
            checkpointer.restore(like)


def test_an_empty_directory_has_no_checkpoint(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, None) as checkpointer:
        assert checkpointer.latest is None
        with pytest.raises(InputError, match="there are: none"):
            checkpointer.read_record()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["every", "keep"])
def test_configs_that_cannot_be(name: str) -> None:
    with pytest.raises(InputError, match=f"checkpoint.{name}=0 must be at least 1"):
        CheckpointConfig(**{name: 0})


def test_learned_scales_of_before_they_had_signs(tmp_path: Path) -> None:
    """All were positive: their signs are 1, and have no moments."""
    mesh = mesh_of(2, 2, 2)
    rules = (FormatRule(pattern="layers.mlp.*", format=Int4Config(group=32), scales="learned"),)
    state = init_state(MODEL, OPTIMIZER, mesh, 0, rules)

    def drop(leaf: Any) -> Any:
        return dataclasses.replace(leaf, sign=None) if isinstance(leaf, Latent) else leaf

    without = jax.tree.map(drop, state, is_leaf=lambda leaf: isinstance(leaf, Latent))
    with Checkpointer(tmp_path, CheckpointConfig(every=3)) as checkpointer:
        assert checkpointer.save(3, without, RECORD)
    like = abstract_state(MODEL, OPTIMIZER, mesh, 0, rules)
    with Checkpointer(tmp_path, None) as checkpointer:
        found = jax.device_get(named_arrays(checkpointer.restore(like, fill_new=fill_signs)))
        model = checkpointer.restore(like.model, prefix="model.", fill_new=fill_signs)
        # Of what is not said to be new, nothing is made up; nor is anything but signs.
        with pytest.raises(InputError, match=r"array '.*\.sign' is missing"):
            checkpointer.restore(like)
        with pytest.raises(InputError, match=r"array '.*unembed' is missing"):
            other = dataclasses.replace(MODEL, tie_embeddings=False)
            checkpointer.restore(abstract_state(other, OPTIMIZER, mesh, 0, rules), fill_new=fill_signs)
    signs = {name: array for name, array in found.items() if name.endswith(".sign")}
    assert len(signs) == 3 * 3
    for name, array in signs.items():
        np.testing.assert_array_equal(array, 1 if name.startswith("model.") else 0, err_msg=name)
    for name, array in named_arrays(without).items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    np.testing.assert_array_equal(model.layers.mlp.up.get_value().sign, 1)
