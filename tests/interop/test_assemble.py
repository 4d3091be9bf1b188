"""Tensors in and out, one at a time: placed where they belong, turned as they must be, refused by name."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai.errors import InputError
from hsai.formats import Int8Config
from hsai.formats.storage import named_arrays, named_weights, replace_weights
from hsai.interop.assemble import assemble, disassemble, stream
from hsai.interop.entries import Entry, check_names
from hsai.models import Transformer, TransformerConfig
from hsai.models.transformer import abstract_transformer
from hsai.sharding import MeshConfig, make_mesh, tree_shardings

CONFIG = TransformerConfig(
    vocab=48, embed=16, layers=3, heads=4, kv_heads=2, head_dim=8, mlp=24, max_length=16, dtype="float32"
)


def make_entries() -> list[Entry]:
    """A tensor a slice, matrices outputs first; q in pairs, and gains with one on top."""
    entries = []
    for leaf, shape in named_arrays(abstract_transformer(CONFIG)).items():
        stacked = leaf.startswith("layers.")
        rank = len(shape.shape) - stacked
        for index in [(layer,) for layer in range(CONFIG.layers)] if stacked else [()]:
            heads = CONFIG.heads if leaf.endswith(".q") else None
            name = f"{leaf}{list(index)}"
            entry = Entry(name=name, leaf=leaf, index=index, transposed=rank == 2, rotary_heads=heads)
            entries.append(Entry(**{**vars(entry), "offset": 1.0}) if leaf == "final_norm.gain" else entry)
    return entries


def draw_tensors(entries: list[Entry]) -> dict[str, np.ndarray]:
    draw, shapes = np.random.default_rng(3), named_arrays(abstract_transformer(CONFIG))
    return {e.name: draw.standard_normal(e.shape(shapes[e.leaf].shape)).astype(np.float32) for e in entries}


@pytest.fixture
def entries() -> list[Entry]:
    return make_entries()


@pytest.fixture
def tensors(entries: list[Entry]) -> dict[str, np.ndarray]:
    return draw_tensors(entries)


@dataclasses.dataclass
class Source:
    """A foreign model in memory."""

    entries: list[Entry]
    tensors: dict[str, np.ndarray]
    path: Path = Path("somewhere")
    config: TransformerConfig = CONFIG
    dtype: np.dtype = np.dtype(np.float32)

    def list_entries(self) -> list[Entry]:
        return list(self.entries)

    def read(self, entry: Entry) -> np.ndarray:
        return self.tensors[entry.name]


def put_together(entries: list[Entry], tensors: dict[str, np.ndarray], **how: object) -> Transformer:
    return assemble(Source(entries, tensors), **how)


def test_slices_stand_where_they_belong(entries: list[Entry], tensors: dict[str, np.ndarray]) -> None:
    model = put_together(entries, tensors)
    assert np.array_equal(model.layers.attention.v[1], tensors["layers.attention.v[1]"].T)
    assert np.array_equal(model.embed[...], tensors["embed[]"].T)
    assert np.array_equal(model.layers.mlp_norm.gain[2], tensors["layers.mlp_norm.gain[2]"])
    assert np.array_equal(model.final_norm.gain[...], tensors["final_norm.gain[]"] - np.float32(1))
    q, ours = tensors["layers.attention.q[2]"], np.asarray(model.layers.attention.q[2])
    for head in range(4):
        for element in range(8):  # element e of a foreign head is half e % 2, pair e // 2
            assert np.array_equal(ours[:, head * 8 + element % 2 * 4 + element // 2], q[head * 8 + element])


def test_there_and_back(entries: list[Entry], tensors: dict[str, np.ndarray]) -> None:
    back = {entry.name: tensor for entry, tensor in disassemble(put_together(entries, tensors), entries)}
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        if name == "final_norm.gain[]":
            np.testing.assert_allclose(back[name], tensor, rtol=0, atol=2e-7)  # what 1 + w rounds away
        else:
            assert np.array_equal(back[name], tensor), name


@pytest.mark.parametrize("sizes", [dict(data=1, fsdp=2, model=2), dict(data=2, fsdp=1, model=4)])
def test_a_mesh_gets_the_same_numbers(
    entries: list[Entry], tensors: dict[str, np.ndarray], sizes: dict[str, int]
) -> None:
    count = sizes["data"] * sizes["fsdp"] * sizes["model"]
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[:count])
    shardings = tree_shardings(abstract_transformer(CONFIG), mesh)
    split, whole = put_together(entries, tensors, shardings=shardings), put_together(entries, tensors)
    for name, array in named_arrays(split).items():
        assert array.sharding == named_arrays(shardings)[name], name
        assert np.array_equal(array, named_arrays(whole)[name]), name
    for entry, tensor in disassemble(split, entries):
        if not entry.offset:
            assert np.array_equal(tensor, tensors[entry.name]), entry.name


def test_arrays_have_the_dtype_asked_for(entries: list[Entry], tensors: dict[str, np.ndarray]) -> None:
    model = put_together(entries, tensors, dtype=jnp.bfloat16)
    assert {array.dtype for array in named_arrays(model).values()} == {jnp.dtype(jnp.bfloat16)}
    assert np.array_equal(model.layers.mlp.up[0], tensors["layers.mlp.up[0]"].T.astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_pieces_of_a_stream_are_the_arrays(entries: list[Entry], tensors: dict[str, np.ndarray], dtype: object) -> None:
    """In their order, bit for bit; tensors are read one by one, each when its turn comes."""
    wanted = named_arrays(put_together(entries, tensors, dtype=dtype))
    seen: list[tuple[int, int]] = []
    pieces = stream(Source(entries[::-1], tensors), dtype, progress=lambda done, total: seen.append((done, total)))
    name, first = next(pieces)
    assert seen == [] and name == next(iter(wanted))
    found: dict[str, list[np.ndarray]] = {name: [first]}
    for name, piece in pieces:
        found.setdefault(name, []).append(piece)
    assert list(found) == list(wanted) and seen[-1] == (len(entries), len(entries))
    for name, array in wanted.items():
        assert {piece.dtype for piece in found[name]} == {array.dtype}
        assert b"".join(piece.tobytes() for piece in found[name]) == np.asarray(array).tobytes(), name


def test_progress_counts_tensors(entries: list[Entry], tensors: dict[str, np.ndarray]) -> None:
    seen: list[tuple[int, int]] = []
    put_together(entries, tensors, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, len(entries)) for done in range(1, len(entries) + 1)]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x[:-1], r"'layers.mlp.up\[1\]' has shape \[23, 16\], the model needs \[24, 16\]"),
        (lambda x: x.T, r"'layers.mlp.up\[1\]' has shape \[16, 24\], the model needs \[24, 16\]"),
        (lambda x: x.astype(np.int8), r"'layers.mlp.up\[1\]' is int8, and a weight is floating"),
        (lambda x: np.where(x == x[3, 3], np.nan, x), r"'layers.mlp.up\[1\]' holds 1 values that are NaN or infinite"),
        (lambda x: np.where(x > 0, np.inf, x).astype(jnp.bfloat16), r"'layers.mlp.up\[1\]' holds \d+ values that are"),
    ],
)
def test_bad_tensors_are_named(
    entries: list[Entry], tensors: dict[str, np.ndarray], spoil: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    tensors["layers.mlp.up[1]"] = spoil(tensors["layers.mlp.up[1]"])
    with pytest.raises(InputError, match=f"^somewhere: tensor {message}"):
        put_together(entries, tensors)
    with pytest.raises(InputError, match=f"^somewhere: tensor {message}"):
        list(stream(Source(entries, tensors)))


def test_a_table_with_a_hole_is_a_defect(entries: list[Entry], tensors: dict[str, np.ndarray]) -> None:
    with pytest.raises(ValueError, match="each of the 3 slices of 'layers.attention.k' once"):
        put_together([entry for entry in entries if entry.name != "layers.attention.k[1]"], tensors)
    with pytest.raises(ValueError, match="lack the array 'embed'"):
        put_together([entry for entry in entries if entry.leaf != "embed"], tensors)


def test_names_are_compared(entries: list[Entry], tensors: dict[str, np.ndarray]) -> None:
    check_names(entries, tensors)
    with pytest.raises(InputError, match=r"'layers.mlp.gate\[0\]' is missing \(1 missing, 1 unknown\)"):
        check_names(entries, {*tensors, "bias"} - {"layers.mlp.gate[0]"})
    with pytest.raises(InputError, match=r"'bias' is unknown \(0 missing, 1 unknown\)"):
        check_names(entries, {*tensors, "bias"})


def test_packed_weights_are_refused_or_dequantized(entries: list[Entry], tensors: dict[str, np.ndarray]) -> None:
    dense = put_together(entries, tensors)
    packed = Int8Config().pack(named_weights(dense)["layers.mlp.up"].get_value())
    model = replace_weights(dense, {"layers.mlp.up": packed})
    with pytest.raises(InputError, match="layers.mlp.up is packed as int8"):
        next(disassemble(model, entries))
    found = {entry.name: tensor for entry, tensor in disassemble(model, entries, dequantize=True)}
    np.testing.assert_allclose(found["layers.mlp.up[2]"], packed.dense()[2].T, rtol=1e-6)
    assert np.array_equal(found["layers.mlp.gate[2]"], tensors["layers.mlp.gate[2]"])
