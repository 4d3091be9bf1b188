"""Output errors of plainly rounded weights over text: as beside a solver, and nothing that is packed moves."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from hsai.compress import RecipeConfig, Rule, compress
from hsai.compress.calibration import CalibrationConfig
from hsai.compress.solvers import FeedbackConfig
from hsai.formats import Int3Config, Int4Config, Int8Config
from hsai.models import Transformer, TransformerConfig

CONFIG = TransformerConfig(
    vocab=96, embed=64, layers=2, heads=2, kv_heads=1, head_dim=32, mlp=128, max_length=32, tie_embeddings=False
)
TOKENS = np.random.default_rng(0).integers(0, 96, (12, 32), dtype=np.int32)
ROUNDED = (
    Rule(pattern="layers.mlp.*", format=Int3Config(group=32)),
    Rule(pattern="layers.attention.q", format=Int8Config()),
    Rule(pattern="embed", format=Int4Config(group=32)),
)
HEAD = Rule(pattern="unembed", format=Int4Config(group=32))


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(CONFIG, rngs=nnx.Rngs(0))


def test_text_measures_what_is_rounded_and_changes_nothing(model: Transformer) -> None:
    recipe = RecipeConfig(rules=(*ROUNDED, HEAD))
    steps: list[tuple[str, int, int]] = []
    without, before = compress(model, recipe)
    packed, after = compress(model, recipe, calibration=TOKENS, progress=lambda *step: steps.append(step))
    for one, other in zip(jax.tree.leaves(without), jax.tree.leaves(packed), strict=True):
        np.testing.assert_array_equal(one, other)
    assert before.layers == () and after.rows == before.rows and ("measuring outputs", 2, 2) in steps
    # Beside a head that is solved, the same weights of the layers are observed, in batches of another size.
    solved = RecipeConfig(
        rules=(*ROUNDED, dataclasses.replace(HEAD, solver=FeedbackConfig())),
        calibration=CalibrationConfig(tokens=384, sequence_length=32, batch=6),
    )
    _, ledger = compress(model, solved, calibration=TOKENS)
    rows, others = ({(row.weight, row.layer): row for row in each.layers} for each in (after, ledger))
    assert len(rows) == len(after.layers) == 2 * 4 + 1 and rows.keys() == others.keys()
    head = rows.pop(("unembed", None)), others.pop(("unembed", None))
    for place, row in rows.items():
        assert row.format == others[place].format and row.damping is None and row.note == ""
        np.testing.assert_allclose(row.output_error, others[place].output_error, rtol=1e-4)
    # What a solver gains is what the two have apart.
    assert head[0].format == head[1].format == "int4 g32" and head[0].output_error > head[1].output_error > 0


def test_what_stays_as_it_is_has_no_row(model: Transformer) -> None:
    recipe = RecipeConfig(rules=ROUNDED)
    packed, _ = compress(model, recipe)
    _, ledger = compress(packed, RecipeConfig(rules=(*ROUNDED, HEAD)), calibration=TOKENS)
    assert [(row.weight, row.layer) for row in ledger.layers] == [("unembed", None)]
