"""Scales of channels: the function stays, the exponent is the one that serves best, and a killed search goes on."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hsai.compress import RecipeConfig, Rule, compress, scaling
from hsai.compress.calibrated import measure_output
from hsai.compress.calibration import CalibrationConfig, draw_windows
from hsai.compress.folds import channel_folds
from hsai.compress.plain import pack_weight
from hsai.compress.plan import plan_recipe
from hsai.compress.resume import Workbench
from hsai.compress.scaling import ScalingConfig, apply_scales, find_scales
from hsai.compress.solvers import FeedbackConfig
from hsai.compress.stream import Grams, Streams, stream_blocks
from hsai.compress.transforms import transform_model
from hsai.errors import InputError
from hsai.formats import DenseConfig, Int4, Int4Config, Int8Config, to_dense
from hsai.formats.storage import named_weights, replace_weights
from hsai.models import MoEConfig, Transformer, TransformerConfig
from hsai.models.transformer import Block
from hsai.sharding import MeshConfig, make_mesh, tree_shardings, use_mesh
from tests.compress.test_rotation import STRUCTURES, naive_logits
from tests.models.conftest import fill_model

CONFIG = TransformerConfig(
    vocab=96, embed=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=128, max_length=64, dtype="float32"
)
CALIBRATION = CalibrationConfig(tokens=256, sequence_length=32, batch=4)
TOKENS = draw_windows(np.random.default_rng(0).integers(0, 96, 1000), CALIBRATION)
BLOCKS = [f"layers.attention.{name}" for name in "qkvo"] + [f"layers.mlp.{name}" for name in ("gate", "up", "down")]


@pytest.fixture(scope="module")
def uneven() -> Transformer:
    """Channels of every fold differ by a factor of ten and more; and there is a head of its own."""
    model = Transformer(dataclasses.replace(CONFIG, tie_embeddings=False), rngs=nnx.Rngs(0))

    def spread(seed: int, *shape: int) -> jax.Array:
        return jnp.exp(1.5 * jax.random.normal(jax.random.key(seed), shape))

    values = {
        "layers.attention_norm.gain": spread(0, 2, 64),
        "layers.mlp_norm.gain": spread(1, 2, 64),
        "final_norm.gain": spread(2, 64),
        "layers.attention.v": model.layers.attention.v.get_value() * spread(3, 2, 1, 32),
        "layers.mlp.up": model.layers.mlp.up.get_value() * spread(4, 2, 1, 128),
    }
    return replace_weights(model, values)


@pytest.mark.parametrize("changes", STRUCTURES.values(), ids=list(STRUCTURES))
def test_the_function_stays(changes: dict[str, Any]) -> None:
    model = fill_model(**changes)
    c, draw = model.config, np.random.default_rng(1)
    experts = () if c.moe is None else (c.moe.experts,)
    shapes: dict[str, tuple[int, ...]] = {
        "layers.attention_norm": (c.layers, c.embed),
        "layers.mlp_norm": (c.layers, c.embed),
        "layers.attention.v": (c.layers, c.kv_heads * c.head_dim),
        "layers.mlp.up": (c.layers, *experts, c.mlp),
    } | ({} if c.tie_embeddings else {"final_norm": (c.embed,)})
    assert {fold.source for fold in channel_folds(c)} == set(shapes)
    factors = {name: jnp.asarray(draw.lognormal(0, 1, shape), jnp.float32) for name, shape in shapes.items()}
    scaled = apply_scales(model, factors)
    np.testing.assert_allclose(naive_logits(scaled), naive_logits(model), rtol=0, atol=1e-4)
    changed = {
        name
        for name, param in named_weights(scaled).items()
        if (param.get_value() != named_weights(model)[name].get_value()).any()
    }
    router = {"layers.mlp.router"} if c.moe is not None else set()
    assert changed >= {*BLOCKS, *router} and ("unembed" in changed) == (not c.tie_embeddings)


def test_the_exponent_is_the_best_of_all_that_are_tried(uneven: Transformer) -> None:
    """Against the definition in float64, of the weights that read the first normalization, and of o, whose input's
    channels are shared by two query heads each."""
    format, seen = Int4Config(group=32), {}

    def keep(layer, block, grams, streams):
        seen[layer] = grams
        return block

    stream_blocks(uneven, TOKENS, batch=4, solve=keep)
    names = ("q", "k", "v", "o")
    formats = {f"layers.attention.{name}": (Int8Config(), format) for name in names}
    found = find_scales(uneven, ScalingConfig(steps=4), formats, TOKENS, batch=4)
    assert [(row.source, row.layer) for row in found.rows] == [
        (source, layer) for layer in (0, 1) for source in ("layers.attention_norm", "layers.attention.v")
    ]
    assert max(row.exponent for row in found.rows) > 0
    for row in found.rows:
        readers = ("o",) if row.source.endswith(".v") else ("q", "k", "v")
        gram = np.asarray(seen[row.layer][f"attention.{readers[0]}"], np.float64)
        squares = np.diagonal(gram)
        if readers == ("o",):
            squares = squares.reshape(2, 2, 16).mean(axis=1).reshape(-1)
        tried = []
        for exponent in (0, 0.25, 0.5, 0.75, 1):
            factor = squares ** (exponent / 2)
            factor /= np.sqrt(factor.max() * factor.min())
            every = np.repeat(factor.reshape(2, 1, 16), 2, axis=1).reshape(-1) if readers == ("o",) else factor
            errors = []
            for name in readers:
                w = np.asarray(getattr(uneven.layers.attention, name)[...][row.layer], np.float64)
                held = np.asarray(pack_weight(jnp.asarray(w * every[:, None], jnp.float32), format).dense())
                missed = w - held / every[:, None]
                errors.append(np.sum(missed * (gram @ missed)) / np.sum(w * (gram @ w)))
            tried.append((np.mean(errors) ** 0.5, exponent, factor))
        best = min(tried, key=lambda found: found[0])
        assert row.exponent == best[1]
        assert row.error_before == pytest.approx(tried[0][0], rel=0.02)
        assert row.error_after == pytest.approx(best[0], rel=0.02)
        np.testing.assert_allclose(found.factors[row.source][row.layer], best[2], rtol=1e-3)


def measure_readers(model: Transformer, tokens: np.ndarray) -> dict[str, float]:
    """||X (w - v)|| / ||X w|| of each product's weight rounded by itself, X what reaches it in the dense model."""
    found: dict[str, float] = {}

    def measure(name: str, w: jax.Array, gram: jax.Array) -> None:
        found[name] = float(measure_output(w, to_dense(pack_weight(w, Int4Config(group=32))), gram))

    def look(layer: int, block: Block, grams: Grams, _: Streams) -> Block:
        for name, gram in grams.items():
            measure(f"{layer} {name}", named_weights(block)[name].get_value(), gram)
        return block

    stream_blocks(
        model, tokens, batch=4, solve=look, finish=lambda gram, _: measure("head", model.unembed.get_value(), gram)
    )
    return found


def test_scaled_weights_lose_less_of_their_outputs(uneven: Transformer) -> None:
    """With every fold, the head's too, on tokens that the search did not see."""
    rules = (Rule(pattern="*", format=Int4Config(group=32)),)
    recipe = RecipeConfig(rules=rules, transforms=(ScalingConfig(steps=5),), calibration=CALIBRATION)
    packed, ledger = compress(uneven, recipe, calibration=TOKENS)
    assert len(ledger.scales) == 2 * 4 + 1 and ledger.scales[-1].source == "final_norm"
    assert ledger.scales[-1].layer is None and all(row.error_after <= row.error_before for row in ledger.scales)
    assert ledger.to_dict()["scales"][0]["source"] == "layers.attention_norm"
    assert isinstance(packed.layers.mlp.up.get_value(), Int4)
    # Gains are dense, and hold what was moved out of them.
    assert (packed.final_norm.gain.get_value() != uneven.final_norm.gain.get_value()).any()
    scaled, rows = transform_model(
        uneven,
        recipe.transforms,
        {name: rule.formats for name, rule in plan_recipe(recipe, uneven).rules.items()},
        calibration=CALIBRATION,
        tokens=TOKENS,
    )
    assert rows == ledger.scales
    unseen = draw_windows(np.random.default_rng(1).integers(0, 96, 1000), CALIBRATION)
    before, after = measure_readers(uneven, unseen), measure_readers(scaled, unseen)
    assert len(before) == 2 * 7 + 1
    ratios = {name: after[name] / error for name, error in before.items()}
    assert all(ratio < 1.02 for ratio in ratios.values()) and np.mean(list(ratios.values())) < 0.87, ratios


class Killed(Exception):
    """What a test ends a run with."""


@dataclasses.dataclass
class Search:
    """Counts searches of a fold's scales, and ends the run at one of them."""

    begun: int = 0
    last: int | None = None

    def begin(self) -> None:
        self.begun += 1
        if self.begun == self.last:
            raise Killed


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Search:
    found, real = Search(), scaling.measure_channels
    monkeypatch.setattr(scaling, "measure_channels", lambda *arguments: found.begin() or real(*arguments))
    return found


SCALED = RecipeConfig(
    rules=(Rule(pattern="*", format=Int4Config(group=32)),),
    transforms=(ScalingConfig(steps=2),),
    calibration=CALIBRATION,
)
"""Two layers of four folds each, and of an untied model the last normalization."""


def run(model: Transformer, directory: Path, recipe: RecipeConfig = SCALED) -> tuple[Transformer, str, list[str]]:
    """The model, its ledger as it is written, and what progress was told."""
    told: list[str] = []
    with Workbench(directory, {"recipe": "a"}) as workbench:
        found, ledger = compress(
            model, recipe, calibration=TOKENS, workbench=workbench, progress=lambda step, *_: told.append(step)
        )
    return found, json.dumps(ledger.to_dict()), told


def check_same(one: tuple[Transformer, str, list[str]], other: tuple[Transformer, str, list[str]]) -> None:
    """To the bit."""
    assert one[1] == other[1]
    for left, right in zip(jax.tree.leaves(one[0]), jax.tree.leaves(other[0]), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(
    ("last", "kept", "anew"),
    [(2, [], 9), (6, ["0000"], 5), (9, ["0000", "0001"], 1)],
    ids=["first layer", "second layer", "head"],
)
def test_a_killed_search_goes_on_at_its_layer(
    uneven: Transformer, tmp_path: Path, search: Search, last: int, kept: list[str], anew: int
) -> None:
    whole = run(uneven, tmp_path / "whole")
    assert search.begun == 9 and whole[2].count("scaling channels") == 2
    search.begun, search.last = 0, last
    with pytest.raises(Killed):
        run(uneven, tmp_path / "bench")
    assert sorted(path.stem.removeprefix("scales_") for path in (tmp_path / "bench").glob("scales_*.json")) == kept
    search.begun, search.last = 0, None
    check_same(run(uneven, tmp_path / "bench"), whole)
    assert search.begun == anew


@pytest.mark.parametrize("moe", [None, MoEConfig(experts=4, active=2)], ids=["dense", "experts"])
def test_a_resumed_run_keeps_the_scales(
    moe: MoEConfig | None, tmp_path: Path, search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once all are found, the stream is not computed for them either."""
    model = Transformer(dataclasses.replace(CONFIG, moe=moe), rngs=nnx.Rngs(0))
    whole = run(model, tmp_path)
    assert search.begun == 8
    search.begun = 0
    monkeypatch.setattr(scaling, "stream_blocks", None)
    again = run(model, tmp_path)
    check_same(again, whole)
    assert search.begun == 0 and "scaling channels" not in again[2]


def test_a_killed_search_on_a_mesh(uneven: Transformer, tmp_path: Path, search: Search) -> None:
    """What is found on eight devices and what is read back into one lie alike, for all that sums over them later."""
    rules = (Rule(pattern="layers.mlp.*", format=Int4Config(group=32), solver=FeedbackConfig()),)
    recipe = dataclasses.replace(SCALED, rules=rules)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    with use_mesh(mesh):
        laid = jax.device_put(uneven, tree_shardings(uneven, mesh))
        whole = run(laid, tmp_path / "whole", recipe)
        search.begun, search.last = 0, 4
        with pytest.raises(Killed):
            run(laid, tmp_path / "bench", recipe)
        search.begun, search.last = 0, None
        check_same(run(laid, tmp_path / "bench", recipe), whole)
    assert search.begun == 2


def test_scales_that_do_not_belong_are_not_used(uneven: Transformer, tmp_path: Path, search: Search) -> None:
    """Half-written ones are found again, another run's are thrown away, damaged ones and other models' refused."""
    whole = run(uneven, tmp_path)
    (tmp_path / "scales_0000.json").unlink()  # a layer is there with its JSON, which comes last
    (tmp_path / ".scales_0000.0011aa.safetensors").write_bytes(b"half")
    (tmp_path / "scales_0000.safetensors").write_bytes(b"older")
    search.begun = 0
    check_same(run(uneven, tmp_path), whole)
    assert search.begun == 4
    with pytest.raises(InputError, match=r"do not fit the model: 'layers.mlp.up' is float32\[128\], .* float32\[64\]"):
        run(Transformer(dataclasses.replace(CONFIG, mlp=64), rngs=nnx.Rngs(0)), tmp_path)
    with pytest.raises(InputError, match="'layers.attention.v' is unknown"):
        down = (Rule(pattern="layers.mlp.down", format=Int4Config(group=32)),)
        run(uneven, tmp_path, dataclasses.replace(SCALED, rules=down))
    path = tmp_path / "scales_0001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"cannot read {path}: .*; remove {tmp_path} to begin anew"):
        run(uneven, tmp_path)
    with Workbench(tmp_path, {"recipe": "b"}) as other:
        assert other.discarded == "2 solved layers, scales of 2 layers"
        other.remove()
    assert not tmp_path.exists()


def test_what_cannot_be_scaled_is_refused(uneven: Transformer) -> None:
    with pytest.raises(InputError, match="steps=0 must be at least 1"):
        ScalingConfig(steps=0)
    rules = (Rule(pattern="embed", format=Int8Config()), Rule(pattern="*.o", format=DenseConfig()))
    with pytest.raises(InputError, match="scaling measures activations, which needs a calibration"):
        RecipeConfig(rules=rules, transforms=(ScalingConfig(),))
    recipe = RecipeConfig(rules=rules, transforms=(ScalingConfig(),), calibration=CALIBRATION)
    with pytest.raises(InputError, match="no rule gives a format to a weight that reads scalable channels"):
        compress(uneven, recipe, calibration=TOKENS)
    with pytest.raises(ValueError, match="needs the calibration's tokens"):
        compress(uneven, recipe)
