"""A whole model is compressed: formats, bytes, errors and the ledger are true, and bad input stops it before work."""

import dataclasses
import io
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from hsai.compress import RecipeConfig, Rule, compress
from hsai.compress.names import name_format
from hsai.compress.one_shot import check_bytes
from hsai.errors import InputError
from hsai.formats import (
    DenseConfig,
    Int2Config,
    Int3Config,
    Int4Config,
    Int8Config,
    NMConfig,
    NMInt4Config,
    NMInt8Config,
    TernaryConfig,
    nbytes,
    to_dense,
)
from hsai.formats.storage import describe, named_weights, replace_weights
from hsai.models import Transformer, TransformerConfig

CONFIG = TransformerConfig(
    vocab=96, embed=64, layers=3, heads=2, kv_heads=1, head_dim=32, mlp=128, max_length=32, dtype="float32"
)
MIXED = RecipeConfig(
    rules=(
        Rule(pattern="embed", format=Int8Config()),
        Rule(pattern="layers.attention.q", format=DenseConfig(dtype="bfloat16")),
        Rule(pattern="layers.attention.k", format=NMConfig(n=2)),
        Rule(pattern="layers.attention.v", format=TernaryConfig(group=None)),
        Rule(pattern="layers.attention.*", format=Int4Config(group=32)),
        Rule(pattern="layers.mlp.down", format=Int3Config(group=64)),
        Rule(pattern="layers.mlp.gate", format=NMInt4Config(n=2, group=64)),
        Rule(pattern="layers.mlp.up", format=Int2Config(group=32)),
    )
)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def mixed(model: Transformer):
    return compress(model, MIXED)


def test_each_weight_has_the_format_of_its_rule(model: Transformer, mixed) -> None:
    compressed, ledger = mixed
    kinds = {name: record["format"] for name, record in describe(compressed).items() if record["format"] != "dense"}
    assert kinds == {
        "embed": "int8",
        "layers.attention.k": "nm",
        "layers.attention.o": "int4",
        "layers.attention.v": "ternary",
        "layers.mlp.down": "int3",
        "layers.mlp.gate": "nm_int4",
        "layers.mlp.up": "int2",
    }
    assert compressed.layers.attention.q.get_value().dtype == jnp.bfloat16
    assert compressed.final_norm.gain.get_value() is model.final_norm.gain.get_value()
    words = {row.weight: row.format for row in ledger.rows}
    assert words["layers.attention.k"] == "2:4 bfloat16" and words["layers.mlp.gate"] == "2:4 int4 g64"
    assert words["layers.attention.v"] == "ternary" == name_format(TernaryConfig(group=None))
    assert name_format(NMInt8Config(n=4, m=8)) == "4:8 int8"
    assert name_format(TernaryConfig()) == "ternary g64" and name_format(NMInt4Config(m=8)) == "2:8 int4 g64"
    assert words["layers.attention.o"] == "int4 g32" and words["layers.attention.q"] == "bfloat16"
    assert (
        words["embed"] == "int8"
        and words["layers.mlp.up"] == "int2 g32"
        and words["layers.mlp.down"] == "int3 g64"
        and words["final_norm.gain"] == "float32"
    )


def test_the_model_that_went_in_is_not_changed(model: Transformer, mixed) -> None:
    """Not a number of it; the model of the same seed is what it was."""
    assert all(record == {"format": "dense"} for record in describe(model).values())
    assert mixed[0].config == model.config
    before = named_weights(Transformer(CONFIG, rngs=nnx.Rngs(0)))
    for name, param in named_weights(model).items():
        np.testing.assert_array_equal(param.get_value(), before[name].get_value(), err_msg=name)


def test_the_compressed_model_runs_and_is_near(model: Transformer) -> None:
    tokens = jnp.arange(16)[None]
    want = model.logits(model(tokens)[0])
    errors = {}
    for format in (DenseConfig(dtype="bfloat16"), Int8Config(), Int4Config(group=32)):
        compressed, _ = compress(model, RecipeConfig(rules=(Rule(pattern="*", format=format),)))
        got = compressed.logits(compressed(tokens)[0])
        errors[format.format] = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
    assert errors["dense"] < 0.02 and errors["int8"] < 0.05 and errors["int4"] < 0.4
    assert errors["dense"] < errors["int8"] < errors["int4"]


def test_the_ledger_counts_every_byte_and_parameter(model: Transformer, mixed) -> None:
    compressed, ledger = mixed
    values = {name: param.get_value() for name, param in named_weights(compressed).items()}
    assert [row.weight for row in ledger.rows] == list(values)
    assert {row.weight: row.bytes for row in ledger.rows} == {name: nbytes(value) for name, value in values.items()}
    assert ledger.bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(compressed))
    assert ledger.size == sum(leaf.size for leaf in jax.tree.leaves(model))
    assert ledger.bits_per_weight == 8 * ledger.bytes / ledger.size
    by_name = {row.weight: row for row in ledger.rows}
    assert by_name["embed"].bits_per_weight == 8 + 32 / 64
    assert by_name["layers.attention.o"].bits_per_weight == 4.5
    assert by_name["layers.mlp.gate"].bits_per_weight == 3.25
    assert by_name["layers.mlp.up"].bits_per_weight == 2.5 and by_name["layers.mlp.down"].bits_per_weight == 3.25
    assert by_name["final_norm.gain"].bits_per_weight == 32


def test_the_errors_are_those_of_the_weights(model: Transformer, mixed) -> None:
    before, after = (named_weights(m) for m in (model, mixed[0]))
    for row in mixed[1].rows:
        w, held = (np.asarray(to_dense(params[row.weight].get_value()), np.float64) for params in (before, after))
        want = np.linalg.norm(w - held) / np.linalg.norm(w)
        assert row.relative_error == pytest.approx(want, rel=1e-4, abs=1e-12)
        assert (row.relative_error > 0) == (row.format != "float32")


def test_a_weight_of_zeros_has_no_error(model: Transformer) -> None:
    zeros = replace_weights(model, {"embed": jnp.zeros((64, 96))})
    _, ledger = compress(zeros, RecipeConfig(rules=(Rule(pattern="embed", format=Int4Config(group=32)),)))
    assert ledger.rows[0].weight == "embed" and ledger.rows[0].relative_error == 0


def test_the_ledger_is_written_as_json_and_shown_as_a_table(mixed, tmp_path: Path) -> None:
    _, ledger = mixed
    ledger.write(tmp_path / "ledger.json")
    stored = json.loads((tmp_path / "ledger.json").read_text())
    assert stored == ledger.to_dict()
    assert stored["bytes"] == ledger.bytes and stored["parameters"] == ledger.size
    assert stored["weights"][0]["weight"] == "embed" and stored["weights"][0]["shape"] == [64, 96]
    assert stored["weights"][0]["relative_error"] == ledger.rows[0].relative_error
    console = Console(width=140, file=io.StringIO())
    console.print(ledger.table())
    text = console.file.getvalue()
    assert all(row.weight in text for row in ledger.rows)
    assert f"{ledger.bytes:,}" in text and f"{ledger.bits_per_weight:.3f}" in text


def test_progress_goes_from_the_first_weight_to_the_last(model: Transformer) -> None:
    seen: list[tuple[str, int, int]] = []
    compress(
        model,
        RecipeConfig(rules=(Rule(pattern="layers.mlp.*", format=Int8Config()),)),
        progress=lambda *report: seen.append(report),
    )
    assert seen == [("compressing", done, 3) for done in (1, 2, 3)]


@pytest.mark.parametrize(
    ("name", "layer", "value", "count"),
    [("layers.mlp.up", ", layer 1,", jnp.nan, 2), ("final_norm.gain", "", jnp.inf, 1)],
)
def test_weights_that_are_no_numbers_stop_it_before_any_work(model: Transformer, name, layer, value, count) -> None:
    old = named_weights(model)[name].get_value()
    place = slice(old.size // 2, old.size // 2 + count) if layer else slice(count)
    broken = replace_weights(model, {name: old.reshape(-1).at[place].set(value).reshape(old.shape)})
    done: list[int] = []
    with pytest.raises(
        InputError, match=rf"{name}{layer} holds {count} values that are NaN or infinite, of {old.size};"
    ):
        compress(broken, MIXED, progress=lambda *_: done.append(1))
    assert not done


def test_a_format_that_does_not_fit_stops_it_before_any_work(model: Transformer) -> None:
    rules = (Rule(pattern="embed", format=Int8Config()), Rule(pattern="layers.*", format=Int4Config(group=128)))
    done: list[int] = []
    with pytest.raises(InputError, match=r"^layers.attention.k: int4 with groups of 128"):
        compress(model, RecipeConfig(rules=rules), progress=lambda *_: done.append(1))
    assert not done


def test_a_value_that_holds_more_than_its_format_promises_is_a_defect() -> None:
    packed = Int4Config(group=32).pack(jnp.ones((64, 8)))
    check_bytes("w", packed, (Int4Config(group=32),))
    wide = dataclasses.replace(packed, scale=packed.scale.astype(jnp.float32))
    with pytest.raises(RuntimeError, match=r"w of shape \(64, 8\) has 320 bytes, .* says 288"):
        check_bytes("w", wide, (Int4Config(group=32),))


def test_compression_is_repeatable(model: Transformer, mixed) -> None:
    again, ledger = compress(model, MIXED)
    jax.tree.map(np.testing.assert_array_equal, again, mixed[0])
    assert ledger == mixed[1]
