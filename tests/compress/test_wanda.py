"""Wanda's masks against a plain loop over each output's groups; what they keep is the dense weight's, only rounded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hsai.compress import RecipeConfig, Rule, calibrated, compress, solved
from hsai.compress.allocate import AllocationConfig
from hsai.compress.block_solver import BlockSolver
from hsai.compress.calibration import CalibrationConfig, draw_windows
from hsai.compress.grid import grid_of
from hsai.compress.plain import pack_weight
from hsai.compress.solvers import FeedbackConfig
from hsai.compress.stream import stream_blocks
from hsai.compress.wanda import WandaConfig, measure_norms, pack_wanda
from hsai.configuration import from_dict, to_dict
from hsai.errors import InputError
from hsai.formats import (
    DenseConfig,
    Int4Config,
    Int8Config,
    NMConfig,
    NMInt4Config,
    NMInt8Config,
    OutliersConfig,
    UnstructuredConfig,
    UnstructuredInt4Config,
    UnstructuredInt8Config,
    VNMConfig,
    VNMInt4Config,
    VNMInt8Config,
    is_packed_as,
    to_dense,
)
from hsai.formats.vnm import VNMPattern
from hsai.models import MoEConfig, Transformer, TransformerConfig

FORMATS = [
    NMConfig(n=2, m=4),
    NMConfig(n=1, m=8, dtype="float32"),
    NMInt8Config(n=2, m=4),
    NMInt4Config(n=4, m=8, group=32),
    VNMConfig(v=8, n=2, m=8),
    VNMInt8Config(v=4, n=1, m=16),
    VNMInt4Config(v=8, n=2, m=8, group=64),
    UnstructuredConfig(density=0.25, block=64, dtype="float32"),
    UnstructuredInt8Config(density=0.5, block=32),
    UnstructuredInt4Config(density=0.5, block=128, group=64),
]
CONFIG = TransformerConfig(
    vocab=96, embed=64, layers=2, heads=2, kv_heads=1, head_dim=32, mlp=128, max_length=64, dtype="float32"
)
CALIBRATION = CalibrationConfig(tokens=512, sequence_length=32, batch=4)
TOKENS = draw_windows(np.random.default_rng(0).integers(0, 96, 1000), CALIBRATION)


def draw(kind: str, size: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """w (D, F) and activations X (N, D). Of "ties" all are small whole numbers, whose products often are the same: one
    token for each position, so that norms are whole too. A third of the positions is then "dead", whole groups of them
    among these."""
    rng = np.random.default_rng(0)
    if kind == "random":
        x = rng.standard_normal((300, size)) * rng.lognormal(0, 1, size)
        return rng.standard_normal((size, outputs)).astype(np.float32), x.astype(np.float32)
    norms = rng.integers(1, 4, size)
    norms[rng.random(size) < 0.2] = 0
    norms[16:32] = 0
    return rng.integers(-4, 5, (size, outputs)).astype(np.float32), np.diag(norms).astype(np.float32)


def rank(scores: np.ndarray, magnitudes: np.ndarray, n: int) -> list[int]:
    """The n positions with the largest scores; of those without any the largest magnitudes; of equals the earlier."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], -magnitudes[i] * (scores[i] == 0), i))[:n]


def choose_plain(w: np.ndarray, norms: np.ndarray, format) -> np.ndarray:
    """The mask bool (D, F) by its definition."""
    n, m = format.counts
    sizes = np.abs(w)
    scores = sizes * norms[:, None]
    dead = sizes * (norms[:, None] == 0)
    mask = np.zeros(w.shape, bool)
    for start in range(0, len(w), m):
        for f in range(w.shape[1]):
            places = np.arange(start, start + m)
            if isinstance(format, VNMPattern):
                block = slice(f // format.v * format.v, f // format.v * format.v + format.v)
                sums = [part[places, block].sum(axis=1, dtype=np.float64) for part in (scores, dead)]
                places = places[sorted(rank(*sums, 4))]
            mask[places[rank(scores[places, f], dead[places, f], n)], f] = True
    return mask


@pytest.mark.parametrize("kind", ["random", "ties"])
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: f"{format.pattern_name} {format.value_name}")
def test_the_largest_scores_stay_as_they_are(format, kind: str) -> None:
    w, x = draw(kind, 256, 16)
    gram = x.T @ x
    packed = pack_wanda(jnp.asarray(w), measure_norms(jnp.asarray(np.diagonal(gram))), format)
    assert is_packed_as(packed, format)
    mask = choose_plain(w, np.sqrt(np.diagonal(gram)), format)
    np.testing.assert_array_equal(packed.kept(), mask)
    assert (mask != np.asarray(format.mask(jnp.asarray(w)))).any(), "magnitudes would say the same"
    held, kept = np.asarray(to_dense(packed)), np.where(mask, w, 0)
    grid = grid_of(format)
    if grid is None:
        np.testing.assert_array_equal(held, np.asarray(jnp.asarray(kept, format.dtype), np.float32))
        return
    # The nearest level of each, under the scales that the kept weights alone would have.
    group = grid.group or len(w)
    scale = np.repeat(np.asarray(packed.scale, np.float32), group, axis=0)
    levels = np.arange(grid.low, grid.high + 1, dtype=np.float32) * scale[..., None]
    nearest = np.abs(kept[..., None] - levels).min(axis=-1)
    np.testing.assert_allclose(np.abs(kept - held), nearest, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(held, to_dense(pack_weight(jnp.asarray(kept), format)))


def test_nothing_can_fail() -> None:
    """No Gram matrix is looked at; and where nothing was excited, magnitudes rank."""
    w, _ = draw("random", 64, 8)
    wide, format = jnp.asarray(w), NMConfig(n=2, m=4)
    steps = np.arange(1.0, 65.0, dtype=np.float32)
    packing = BlockSolver({}, {"up": jnp.asarray(steps**2)}).pack("up", wide, format, WandaConfig())
    np.testing.assert_array_equal(packing.weight.kept(), choose_plain(w, steps, format))
    assert packing.damping is None and packing.note == ""
    idle = pack_wanda(wide, measure_norms(jnp.zeros(64)), format)
    np.testing.assert_array_equal(idle.kept(), format.mask(wide))


def test_outliers_are_those_of_the_largest_scores() -> None:
    """And take no place in the mask, of a loud position that magnitudes would not name."""
    w, x = draw("random", 128, 16)
    x[:, 77] *= 50
    gram = x.T @ x
    base = NMConfig(n=2, m=4)
    format = OutliersConfig(base=base, share=2 / 128)
    packed = pack_wanda(jnp.asarray(w), measure_norms(jnp.asarray(np.diagonal(gram))), format)
    norms = np.sqrt(np.diagonal(gram))
    loudest = np.sort(np.argsort(-np.sum((w * norms[:, None]) ** 2, axis=1))[:2])
    assert packed.index[:, 0].tolist() == loudest.tolist() and 77 in loudest
    norms[loudest] = 0
    mask = choose_plain(np.where(norms[:, None] > 0, w, 0), norms, base)
    np.testing.assert_array_equal(packed.base.kept(), mask)
    mask[loudest] = True
    np.testing.assert_array_equal(to_dense(packed), np.where(mask, jnp.asarray(w, jnp.bfloat16), 0))


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Whose activations are uneven."""
    made = Transformer(CONFIG, rngs=nnx.Rngs(0))
    for seed, norm in enumerate((made.layers.attention_norm, made.layers.mlp_norm)):
        norm.gain.set_value(jnp.exp(jax.random.normal(jax.random.key(seed), (CONFIG.layers, 64))))
    return made


def test_layers_are_pruned_one_behind_the_other(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by the norms that the pruned layers before it hand on; nothing is factorized. The masks are those that
    error feedback is given as well, and miss less of the outputs than magnitudes."""

    def refuse(*_: object) -> None:
        raise AssertionError("a factor was asked for")

    format, seen = NMConfig(n=2, m=4), []
    real = calibrated.stream_blocks

    def listen(*arguments, solve, **words) -> None:
        real(*arguments, solve=lambda n, block, g, s: (seen.append(s.squares), solve(n, block, g, s))[1], **words)

    def run(solver):
        recipe = RecipeConfig(rules=(Rule(pattern="layers.*", format=format, solver=solver),), calibration=CALIBRATION)
        return compress(model, recipe, calibration=TOKENS)

    with monkeypatch.context() as patch:
        patch.setattr(solved, "factorize", refuse)
        patch.setattr(calibrated, "stream_blocks", listen)
        found, ledger = run(WandaConfig())
    for name in ("mlp.down", "attention.o"):
        module, leaf = name.split(".")
        dense, packed = (getattr(getattr(m.layers, module), leaf).get_value() for m in (model, found))
        for layer in range(CONFIG.layers):
            mask = choose_plain(np.asarray(dense[layer]), np.sqrt(seen[layer][name]), format)
            wanted = np.where(mask, jnp.asarray(dense[layer], jnp.bfloat16), 0)
            np.testing.assert_array_equal(to_dense(packed)[layer], wanted)
    assert len(ledger.layers) == 7 * CONFIG.layers and all(0 < row.output_error < 1 for row in ledger.layers)
    assert all(row.damping is None and not row.note for row in ledger.layers)
    updated, _ = run(FeedbackConfig(mask="wanda"))
    first = [np.asarray(m.layers.mlp.up.get_value().kept()[0]) for m in (found, updated)]
    up = np.asarray(seen[0]["mlp.up"])
    np.testing.assert_array_equal(first[0], choose_plain(np.asarray(model.layers.mlp.up[...][0]), np.sqrt(up), format))
    assert np.mean(first[0] == first[1]) > 0.95  # behind another attention
    first_seen: list = []
    stream_blocks(model, TOKENS, batch=4, raw=True, solve=lambda n, block, g, s: (first_seen.append(s), block)[1])
    raw, squares = first_seen[0].raw["attention.q"], first_seen[0].squares["attention.q"]
    np.testing.assert_allclose(squares, np.diagonal(raw), rtol=1e-4)
    w = model.layers.attention.q.get_value()[0]
    errors = [
        calibrated.measure_output(w, to_dense(packed), raw)
        for packed in (pack_wanda(w, measure_norms(squares), format), format.pack(w))
    ]
    assert errors[0] < 0.9 * errors[1], errors


def test_each_expert_by_its_own_tokens() -> None:
    """One to which none were routed, its rate being between those of two others, keeps magnitudes, and that is told."""
    config = dataclasses.replace(CONFIG, layers=1, mlp=32, moe=MoEConfig(experts=4, active=1))
    made = Transformer(config, rngs=nnx.Rngs(0))
    made.layers.mlp_norm.gain.set_value(jnp.exp(jax.random.normal(jax.random.key(0), (1, 64))))
    router = made.layers.mlp.router.get_value()
    made.layers.mlp.router.set_value(router.at[:, :, 2].set((router[:, :, 0] + router[:, :, 1]) / 2))
    seen: list = []
    stream_blocks(made, TOKENS, batch=4, solve=lambda n, block, g, s: (seen.append(s.squares), block)[1])
    format = UnstructuredInt4Config(group=32)
    recipe = RecipeConfig(
        rules=(Rule(pattern="layers.mlp.up", format=format, solver=WandaConfig()),), calibration=CALIBRATION
    )
    found, ledger = compress(made, recipe, calibration=TOKENS)
    w, kept = np.asarray(made.layers.mlp.up[...][0]), np.asarray(found.layers.mlp.up.get_value().kept()[0])
    norms = np.sqrt(seen[0]["mlp.up"])
    assert not norms[2].any() and len({tuple(row) for row in norms.round(3).tolist()}) == 4
    for expert in range(4):
        np.testing.assert_array_equal(kept[expert], choose_plain(w[expert], norms[expert], format))
    (row,) = ledger.layers
    assert (row.note, row.damping) == ("no token went to expert 2", None)


def test_heads_are_pruned_over_what_reaches_them(model: Transformer) -> None:
    format = NMInt8Config(n=2, m=4)
    recipe = RecipeConfig(rules=(Rule(pattern="embed", format=format, solver=WandaConfig()),), calibration=CALIBRATION)
    found, ledger = compress(model, recipe, calibration=TOKENS)
    hidden = np.asarray(model(jnp.asarray(TOKENS))[0].reshape(-1, 64), np.float64)
    mask = choose_plain(np.asarray(model.embed[...]), np.sqrt(np.sum(hidden**2, axis=0)), format)
    assert np.mean(found.embed.get_value().kept() == mask) > 0.999  # sums over tokens in another order
    (row,) = ledger.layers
    assert (row.weight, row.layer, row.damping, row.note) == ("embed", None, None, "")


def test_a_budget_tries_what_it_would_prune(model: Transformer) -> None:
    """Of candidates that prune nothing there is nothing to choose: they are rounded by themselves."""
    candidates = (Int8Config(), NMInt4Config(n=2, m=4, group=32))
    recipe = RecipeConfig(
        rules=(Rule(pattern="layers.mlp.*", format=candidates, solver=WandaConfig()),),
        calibration=CALIBRATION,
        allocation=AllocationConfig(bits_per_weight=16.0, windows=4),
    )
    found, ledger = compress(model, recipe, calibration=TOKENS)
    assert ledger.allocation is not None
    assert {option.format for option in ledger.allocation.options} == set(candidates)
    for name, formats in ledger.allocation.formats.items():
        dense = getattr(model.layers.mlp, name.rsplit(".", 1)[1]).get_value()
        held = to_dense(getattr(found.layers.mlp, name.rsplit(".", 1)[1]).get_value())
        for layer, format in enumerate(formats):
            if format == candidates[0]:
                np.testing.assert_array_equal(held[layer], to_dense(pack_weight(dense[layer], format)))


def test_what_has_no_mask_to_choose_is_refused() -> None:
    for format in (Int4Config(), DenseConfig(), OutliersConfig(base=Int4Config()), (Int8Config(), Int4Config())):
        with pytest.raises(
            InputError, match="'\\*': .* prunes nothing, and the Wanda solver chooses nothing else"
        ) as e:
            Rule(pattern="*", format=format, solver=WandaConfig())
        assert "\n" not in str(e.value)
    rule = Rule(pattern="layers.*", format=NMConfig(), solver=WandaConfig())
    assert from_dict(Rule, to_dict(rule)) == rule
    with pytest.raises(InputError, match="'layers.\\*' has a solver that reads activations, which needs a calibration"):
        RecipeConfig(rules=(rule,))
