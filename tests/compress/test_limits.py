"""Numbers that a format cannot hold: found before the work, or rounded plainly and reported; they end no run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hsai.compress import RecipeConfig, Rule, compress
from hsai.compress.block_solver import BlockSolver
from hsai.compress.calibration import CalibrationConfig, draw_windows
from hsai.compress.ledger import BlockRow, LayerRow
from hsai.compress.limits import check_held, check_range, count_lost
from hsai.compress.plain import pack_weight
from hsai.compress.scaling import ScalingConfig
from hsai.compress.solvers import FeedbackConfig
from hsai.errors import InputError
from hsai.formats import DenseConfig, Int4Config, Int4OffsetConfig, NMConfig, OutliersConfig, stack_layers
from hsai.formats.storage import replace_weights
from hsai.models import Transformer, TransformerConfig

CONFIG = TransformerConfig(
    vocab=96, embed=64, layers=3, heads=2, kv_heads=1, head_dim=32, mlp=64, max_length=64, dtype="float32"
)
CALIBRATION = CalibrationConfig(tokens=256, sequence_length=32, batch=4)
TOKENS = draw_windows(np.random.default_rng(0).integers(0, 96, 1000), CALIBRATION)
OFFSET = Int4OffsetConfig(group=32)


def draw_edge(margin: float) -> tuple[jax.Array, jax.Array]:
    """A weight (64, 16) and a Gram matrix: positions i and 32 + i are multiplied by the same activations, so that
    32 + i makes up for an error at i; there a group stands at the lowest minimum of float16.

    `margin` is how far above, as a share of the largest error that is passed on to it.
    """
    w = np.zeros((64, 16), np.float32)
    w[:32] = np.random.default_rng(0).uniform(-40000, 40000, (32, 16))
    missed = w - np.asarray(pack_weight(jnp.asarray(w), OFFSET).dense())
    w[32:, 3] = -65504 + margin * np.abs(missed[:32, 3]).max()
    gram = np.kron(np.ones((2, 2)), np.eye(32)).astype(np.float32)
    return jnp.asarray(w), jnp.asarray(gram)


@pytest.mark.parametrize(("margin", "damping"), [(1.5, 0.01), (0.1, 10.0), (0.0, None)])
def test_a_solve_that_leaves_the_format_is_damped_and_at_last_rounded(margin: float, damping: float | None) -> None:
    w, gram = draw_edge(margin)
    found = BlockSolver({"up": gram}, {}).pack("up", w, OFFSET, FeedbackConfig())
    assert count_lost(found.weight) == 0
    assert found.damping == damping if damping is None else found.damping == pytest.approx(damping)
    if damping is None:
        assert found.note.startswith("rounded plainly: solving gave ") and found.note.endswith("of 1024 weights")
        jax.tree.map(np.testing.assert_array_equal, found.weight, pack_weight(w, OFFSET))
    else:
        assert ("damping was raised to 10: solving gave" in found.note) == (damping == 10)


def test_such_a_layer_is_reported_and_those_behind_it_are_solved() -> None:
    model = Transformer(CONFIG, rngs=nnx.Rngs(0))
    up = model.layers.mlp.up.get_value()
    edge = up.at[1].set(up[1] * 2e5).at[1, 32:].set(-65504)  # errors of the first half push the second further down
    rules = (Rule(pattern="layers.mlp.*", format=OFFSET, solver=FeedbackConfig()),)
    recipe = RecipeConfig(rules=rules, calibration=CALIBRATION)
    _, ledger = compress(replace_weights(model, {"layers.mlp.up": edge}), recipe, calibration=TOKENS)
    noted = [(row.weight, row.layer) for row in ledger.layers if row.note]
    assert noted == [("layers.mlp.up", 1)] and len(ledger.layers) == 9
    (remark,) = ledger.remarks
    assert remark.startswith("layers.mlp.up, layer 1: rounded plainly: solving gave ")


def test_remarks_join_layers_that_say_the_same() -> None:
    model = Transformer(CONFIG, rngs=nnx.Rngs(0))
    _, ledger = compress(model, RecipeConfig(rules=(Rule(pattern="embed", format=Int4Config(group=32)),)))
    assert ledger.remarks == []
    row = {"format": "int4", "output_error": None, "damping": None}
    rows = [LayerRow(weight="layers.a", layer=layer, note="x" if layer != 1 else "", **row) for layer in range(3)]
    block = BlockRow(layer=4, error_solved=None, error_tuned=None, tuned=False, note="y")
    noted = dataclasses.replace(ledger, layers=(*rows, LayerRow(weight="embed", layer=None, note="x", **row)))
    assert noted.remarks == ["layers.a, layer 0, 2: x", "embed: x"]
    assert dataclasses.replace(noted, layers=(), blocks=(block,)).remarks == ["layer 4: y"]


@pytest.mark.parametrize(
    ("value", "format", "message"),
    [
        (70000.0, OFFSET, "^layers.mlp.up, layer 2: int4_offset stores .* at most 65504, and this weight needs 70000"),
        (-2e6, OFFSET, "layer 2: int4_offset .* needs 2e[+]06; give it another format"),
        (70000.0, OutliersConfig(base=OFFSET), "layer 2: int4_offset stores .* needs 70000"),
        (-1e19, Int4Config(group=32), "^layers.mlp.up, layer 2 holds -1e[+]19, and its squares add up to more than"),
        (3.4e38, DenseConfig(dtype="bfloat16"), "^layers.mlp.up, layer 2 holds 3.4e[+]38"),
    ],
)
@pytest.mark.parametrize("transforms", [(), (ScalingConfig(),)], ids=["", "scaled"])
def test_what_no_rounding_could_hold_is_refused_before_work(value: float, format, message: str, transforms) -> None:
    model = Transformer(CONFIG, rngs=nnx.Rngs(0))
    up = model.layers.mlp.up.get_value()
    wide = replace_weights(model, {"layers.mlp.up": up.at[2, :32, 3].set(value)})
    rules = (
        Rule(pattern="layers.mlp.up", format=format),
        Rule(pattern="layers.mlp.down", format=OFFSET, solver=FeedbackConfig()),
    )
    done: list[str] = []
    with pytest.raises(InputError, match=message):
        recipe = RecipeConfig(rules=rules, calibration=CALIBRATION, transforms=transforms)
        compress(wide, recipe, calibration=TOKENS, progress=lambda step, *_: done.append(step))
    assert not done


def test_large_numbers_that_fit_are_packed() -> None:
    w = jnp.ones((3, 64, 8)).at[1].set(65504.0).at[2, 0].set(9e5)
    check_range("layers.w", w.at[2].set(0), (OFFSET, Int4Config(group=32), NMConfig()))
    check_range("layers.w", w, (Int4Config(group=32), NMConfig()))
    check_range("layers.w", w, (OFFSET,))  # a scale of 60000 reaches them from a minimum of 1
    packed = pack_weight(w, OFFSET)
    check_held("layers.w", w, packed)
    assert np.allclose(packed.dense()[2, 0], 9e5, rtol=1e-3)


def test_a_packed_weight_that_holds_no_numbers_is_named() -> None:
    w = jnp.ones((3, 64, 8))
    packed = pack_weight(w, Int4Config(group=32))
    broken = dataclasses.replace(packed, scale=packed.scale.at[2, 1, :3].set(jnp.inf))
    with pytest.raises(
        InputError, match="^layers.w, layer 2: packing gave 3 scales or values .* whose largest number is 1;"
    ):
        check_held("layers.w", w, broken)
    one = pack_weight(w[0], OFFSET)
    runs = stack_layers([one, jax.tree.map(lambda x: x[2], broken)])
    with pytest.raises(InputError, match="^layers.w, layer 1: packing gave 3 "):
        check_held("layers.w", w[:2], runs)
    with pytest.raises(InputError, match="^layer 1: w: packing gave 3 "):
        check_held("layer 1: w", w[0], runs.parts[1])
