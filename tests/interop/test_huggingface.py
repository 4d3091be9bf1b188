"""Checkpoints of `transformers`: the same logits here, and every bit back."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hsai.errors import InputError
from hsai.formats import Int8Config
from hsai.formats.storage import named_arrays, named_weights, replace_weights
from hsai.interop.assemble import assemble
from hsai.interop.families import FAMILIES as TABLE
from hsai.interop.huggingface import INDEX, SINGLE, open_checkpoint, write_huggingface
from hsai.interop.huggingface_config import read_config
from hsai.models import KVCache, Transformer
from hsai.models.transformer import abstract_transformer
from hsai.sharding import MeshConfig, make_mesh, tree_shardings
from tests.interop.checkpoints import FAMILIES
from tests.interop.conftest import GetForeign

CLOSE = 2e-5
"""Largest difference of a logit from torch's, both in float32; the logits of these models reach about 4."""


@jax.jit
def forward(model: Transformer, tokens: jax.Array) -> jax.Array:
    return model.logits(model(tokens)[0])


@jax.jit
def read_more(model: Transformer, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache | None]:
    hidden, cache = model(tokens, cache=cache)
    return model.logits(hidden), cache


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def test_every_architecture_is_tested() -> None:
    tested = {case.config.model_type for case in FAMILIES.values()}
    assert tested == {family.model_type for family in TABLE}


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_torch(name: str, foreign: GetForeign) -> None:
    """Read at once; and through a cache: some tokens together, the others one by one."""
    source = foreign(name)
    model = assemble(open_checkpoint(source.directory))
    assert np.abs(source.logits).max() > 1  # the comparison is of something
    np.testing.assert_allclose(forward(model, source.tokens), source.logits, rtol=0, atol=CLOSE)
    cache: KVCache | None = model.make_cache(2, 24)
    found = []
    for piece in np.split(source.tokens, range(13, 20), axis=1):
        logits, cache = read_more(model, piece, cache)
        found.append(logits)
    np.testing.assert_allclose(np.concatenate(found, axis=1), source.logits, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back_is_the_same_bit_for_bit(name: str, foreign: GetForeign, tmp_path: Path) -> None:
    source = foreign(name)
    checkpoint = open_checkpoint(source.directory)
    tokens = {key: checkpoint.raw[key] for key in ("bos_token_id", "eos_token_id")}
    family = write_huggingface(
        tmp_path / "back",
        assemble(checkpoint),
        architecture=checkpoint.family.architecture,
        tokens=tokens,
        shard_bytes=60_000,
    )
    assert family is checkpoint.family
    before, after = read_tensors(source.directory), read_tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for label, tensor in before.items():
        assert tensor.dtype == after[label].dtype and torch.equal(tensor, after[label]), label
    wanted, found = (
        transformers.AutoConfig.from_pretrained(directory).to_dict()
        for directory in (source.directory, tmp_path / "back")
    )
    ignored = {"_name_or_path", "transformers_version", "_sliding_window_pattern"}
    ignored |= {"intermediate_size"} if name == "qwen3_moe" else set()  # of layers without experts, which it has not
    for key, value in wanted.items():
        if key not in ignored and (key, value) != ("head_dim", None):
            assert found[key] == value, key
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values())
    assert type(model).__name__ == family.architecture and model.dtype == torch.float32
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(source.tokens.astype(np.int64))).logits.numpy()
    assert np.array_equal(logits, source.logits)


def test_files_are_cut_at_the_size_asked_for(foreign: GetForeign, tmp_path: Path) -> None:
    source = foreign("llama").directory
    assert len(list(source.glob("*.safetensors"))) > 1 and (source / INDEX).exists()  # read from several files
    model = assemble(open_checkpoint(source))
    write_huggingface(tmp_path / "one", model)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["config.json", SINGLE]
    write_huggingface(tmp_path / "many", model, shard_bytes=20_000)
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert set(index["weight_map"].values()) == {path.name for path in files} and len(files) > 3
    sizes = {path.name: sum(t.nbytes for t in load_file(path).values()) for path in files}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert all(size <= 20_000 or len(load_file(tmp_path / "many" / name)) == 1 for name, size in sizes.items())
    for path in files:
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_in_and_out(dtype: str, foreign: GetForeign, tmp_path: Path) -> None:
    """bfloat16 stays what it is; float16 has digits that bfloat16 lacks, and is held in float32."""
    model = assemble(open_checkpoint(foreign("qwen2").directory))
    write_huggingface(tmp_path / "half", model, dtype=dtype)
    checkpoint = open_checkpoint(tmp_path / "half")
    assert checkpoint.config == dataclasses.replace(model.config, dtype="bfloat16")
    again = assemble(checkpoint)
    kind = jnp.bfloat16 if dtype == "bfloat16" else jnp.float32
    for name, array in named_arrays(again).items():
        assert array.dtype == kind, name
        assert np.array_equal(array, named_arrays(model)[name].astype(dtype).astype(kind)), name
    write_huggingface(tmp_path / "again", again, dtype=dtype)
    for label, tensor in read_tensors(tmp_path / "half").items():
        assert torch.equal(tensor, read_tensors(tmp_path / "again")[label]), label
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert loaded.dtype == getattr(torch, dtype)


def test_a_mesh_reads_what_one_device_does(foreign: GetForeign) -> None:
    checkpoint = open_checkpoint(foreign("qwen3_moe").directory)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, model=2), jax.devices()[:4])
    shardings = tree_shardings(abstract_transformer(checkpoint.config), mesh)
    split, whole = assemble(checkpoint, shardings), assemble(checkpoint)
    for name, array in named_arrays(split).items():
        assert array.sharding == named_arrays(shardings)[name] and np.array_equal(array, named_arrays(whole)[name])
    assert any(not array.sharding.is_fully_replicated for array in named_arrays(split).values())


def test_a_tied_head_may_be_stored_twice(foreign: GetForeign, tmp_path: Path) -> None:
    copy = shutil.copytree(foreign("qwen2").directory, tmp_path / "copy")
    tensors = load_file(copy / SINGLE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, copy / SINGLE)
    assert "lm_head.weight" not in open_checkpoint(copy).tensors
    tensors["lm_head.weight"][5, 5] += 1
    save_file(tensors, copy / SINGLE)
    with pytest.raises(InputError, match="'lm_head.weight' is not 'model.embed_tokens.weight', to which config.json"):
        open_checkpoint(copy)


def test_packed_weights_are_written_only_as_dense_ones(foreign: GetForeign, tmp_path: Path) -> None:
    dense = assemble(open_checkpoint(foreign("qwen2").directory))
    packed = Int8Config().pack(named_weights(dense)["layers.mlp.up"].get_value())
    model = replace_weights(dense, {"layers.mlp.up": packed})
    with pytest.raises(InputError, match="layers.mlp.up is packed as int8"):
        write_huggingface(tmp_path / "out", model)
    assert list(tmp_path.iterdir()) == []
    write_huggingface(tmp_path / "out", model, dequantize=True)
    found = read_tensors(tmp_path / "out")["model.layers.1.mlp.up_proj.weight"].numpy()
    np.testing.assert_allclose(found, packed.dense()[1].T, rtol=1e-6)


def test_a_number_too_large_for_float16_leaves_nothing_behind(foreign: GetForeign, tmp_path: Path) -> None:
    model = assemble(open_checkpoint(foreign("qwen2").directory))
    large = replace_weights(model, {"embed": model.embed[...].at[3, 3].set(1e5)})
    with pytest.raises(InputError, match="'model.embed_tokens.weight' has numbers beyond the range of float16"):
        write_huggingface(tmp_path / "out", large, dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_no_architecture_is_refused(tmp_path: Path) -> None:
    config = read_config({**QWEN2, "tie_word_embeddings": True})[1]
    odd = abstract_transformer(dataclasses.replace(config, post_norm=True))
    with pytest.raises(InputError, match="no architecture of transformers computes this model"):
        write_huggingface(tmp_path / "out", odd)
    assert list(tmp_path.iterdir()) == []


QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 9,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
}


def edit(directory: Path, **changes: Any) -> None:
    """Changes config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory: Path, **changes: torch.Tensor | None) -> None:
    """Adds, replaces or removes tensors of a single file."""
    tensors = load_file(directory / SINGLE) | {name.replace("__", "."): value for name, value in changes.items()}
    save_file({name: value for name, value in tensors.items() if value is not None}, directory / SINGLE)


def edit_index(directory: Path, change: Any) -> None:
    """Changes the index of several files."""
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


UP = "model.layers.1.mlp.up_proj.weight"
FAULTS: dict[str, tuple[str, Any, str]] = {
    "a missing tensor": ("qwen2", lambda d: edit_tensors(d, **{UP: None}), f"'{UP}' is missing .1 missing, 0 unknown"),
    "an unknown tensor": ("qwen2", lambda d: edit_tensors(d, extra__bias=torch.ones(3)), "'extra.bias' is unknown"),
    "a layer too many": (
        "qwen2",
        lambda d: edit(d, num_hidden_layers=2, layer_types=None),
        "'model.layers.2.* is unknown",
    ),
    "a layer too few": (
        "qwen2",
        lambda d: edit(d, num_hidden_layers=4, layer_types=None),
        "'model.layers.3.* is missing",
    ),
    "layers beyond counting": (
        "qwen2",
        lambda d: edit(d, num_hidden_layers=10**12, layer_types=None),
        "says 1000000000000 layers",
    ),
    "another shape": (
        "qwen2",
        lambda d: edit(d, intermediate_size=57),
        r"has shape \[40, 56\], config.json says \[40, 57\]",
    ),
    "a number that is none": (
        "qwen2",
        lambda d: edit_tensors(d, **{UP: torch.full((56, 40), torch.nan)}),
        f"'{UP}' holds 2240 values that are NaN or infinite, of 2240",
    ),
    "integers": ("qwen2", lambda d: edit_tensors(d, **{UP: torch.ones((56, 40), dtype=torch.int8)}), f"'{UP}' is 'I8'"),
    "no weights": ("qwen2", lambda d: (d / SINGLE).unlink(), "neither model.safetensors nor model.safetensors.index"),
    "no config": ("qwen2", lambda d: (d / "config.json").unlink(), "cannot read .*config.json: No such file"),
    "a config that is none": ("qwen2", lambda d: (d / "config.json").write_text("{"), "config.json is not a JSON file"),
    "an index without files": ("llama", lambda d: (d / INDEX).write_text("{}"), "has no weight_map"),
    "a file outside": (
        "llama",
        lambda d: edit_index(d, lambda m: m.update(x="../x")),
        "names the file '../x', which is",
    ),
    "a file that is not there": (
        "llama",
        lambda d: sorted(d.glob("*.safetensors"))[-1].unlink(),
        "names the file 'model-0000.-of-0000..safetensors', which is not in the directory",
    ),
    "a tensor that is elsewhere": (
        "llama",
        lambda d: edit_index(d, lambda m: m.update({UP: m["lm_head.weight"]})),
        f"holds tensor '{UP}', which the index does not place there",
    ),
    "a tensor that the index lacks": ("llama", lambda d: edit_index(d, lambda m: m.pop(UP)), f"holds tensor '{UP}'"),
    "a tensor that only the index has": (
        "llama",
        lambda d: edit_index(d, lambda m: m.update(y=m[UP])),
        "lacks tensor 'y', which the index places there",
    ),
}


@pytest.mark.parametrize(("family", "damage", "message"), FAULTS.values(), ids=list(FAULTS))
def test_what_is_not_whole_is_refused(
    family: str, damage: Any, message: str, foreign: GetForeign, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(foreign(family).directory, tmp_path / "copy"))
    damage(copy)
    with pytest.raises(InputError, match=message) as caught:
        assemble(open_checkpoint(copy))
    assert "\n" not in str(caught.value) and str(copy) in str(caught.value)


def test_derived_tensors_of_old_versions_are_left_out(foreign: GetForeign, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(foreign("qwen2").directory, tmp_path / "copy"))
    edit_tensors(copy, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)})
    assert open_checkpoint(copy).tensors.keys() == open_checkpoint(foreign("qwen2").directory).tensors.keys()
