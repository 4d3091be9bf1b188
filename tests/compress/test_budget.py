"""A whole model under a budget: bytes are kept, the ledger is true, and the divergence is below that of one format."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from hsai.compress import Ledger, RecipeConfig, Rule, compress
from hsai.compress.allocate import AllocationConfig
from hsai.compress.budget import count_least
from hsai.compress.calibration import CalibrationConfig
from hsai.compress.names import name_format, name_ranges
from hsai.compress.plain import NearestConfig, pack_weight
from hsai.compress.plan import plan_recipe
from hsai.compress.solvers import FeedbackConfig
from hsai.errors import InputError
from hsai.formats import (
    DenseConfig,
    FormatConfig,
    Int4Config,
    Int4OffsetConfig,
    Int8Config,
    NMInt4Config,
    Runs,
    TernaryConfig,
    is_packed_as,
    nbytes,
    take_layer,
    to_dense,
)
from hsai.formats.storage import named_weights, replace_weights
from hsai.models import Transformer
from tests.compress.trained import (
    CALIBRATION,
    calibration_windows,
    divergence,
    trained_model,
    unseen_losses,
    unseen_windows,
)

BLOCKS: tuple[FormatConfig, ...] = (
    Int8Config(),
    Int4Config(group=64),
    NMInt4Config(n=2, m=4, group=64),
    TernaryConfig(group=64),
)
TABLES: tuple[FormatConfig, ...] = (Int8Config(), Int4Config(group=64))


def make_recipe(solver: FeedbackConfig | NearestConfig, blocks=BLOCKS, **budget) -> RecipeConfig:
    rules = (Rule(pattern="layers.*", format=blocks, solver=solver), Rule(pattern="embed", format=TABLES))
    return RecipeConfig(rules=rules, calibration=CALIBRATION, allocation=AllocationConfig(**{"windows": 64, **budget}))


def make_uniform(blocks: FormatConfig, table: FormatConfig, solver: FeedbackConfig | NearestConfig) -> RecipeConfig:
    rules = (Rule(pattern="layers.*", format=blocks, solver=solver), Rule(pattern="embed", format=table))
    solved = isinstance(solver, FeedbackConfig)
    return RecipeConfig(rules=rules, calibration=CALIBRATION if solved else None)


def run(recipe: RecipeConfig) -> tuple[Transformer, Ledger]:
    return compress(trained_model(), recipe, calibration=calibration_windows() if recipe.calibration else None)


@pytest.fixture(scope="module")
def mixed() -> tuple[Transformer, Ledger]:
    return run(make_recipe(FeedbackConfig(), bits_per_weight=4.0))


def test_the_bytes_are_within_the_budget_and_use_it(mixed: tuple[Transformer, Ledger]) -> None:
    model, ledger = mixed
    assert ledger.allocation is not None
    size = sum(leaf.size for leaf in jax.tree.leaves(trained_model()))
    assert ledger.allocation.budget == int(4.0 * size / 8)
    assert ledger.bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(model)) <= ledger.allocation.budget
    assert ledger.bytes > 0.98 * ledger.allocation.budget
    assert 3.9 < ledger.bits_per_weight <= 4.0
    assert ledger.allocation.least < ledger.bytes < ledger.allocation.most


def test_the_ledger_says_what_each_layer_became(mixed: tuple[Transformer, Ledger]) -> None:
    model, ledger = mixed
    allocation = ledger.allocation
    assert allocation is not None
    values = {name: param.get_value() for name, param in named_weights(model).items()}
    assert any(isinstance(value, Runs) for value in values.values())
    assert len(allocation.items) == 4 * 7 + 1 and set(allocation.formats) == {
        row.weight for row in ledger.rows if "norm" not in row.weight
    }
    for item, option in zip(allocation.items, allocation.options, strict=True):
        value = values[item.weight] if item.layer is None else take_layer(values[item.weight], item.layer)
        assert nbytes(value) == option.bytes
        packed = jax.eval_shape(option.format.pack, jax.ShapeDtypeStruct(value.shape, jnp.float32))
        assert jax.tree.structure(packed) == jax.tree.structure(value)
    rows = {row.weight: row for row in ledger.rows}
    for name, formats in allocation.formats.items():
        w, held = (
            np.asarray(to_dense(named_weights(m)[name].get_value()), np.float64) for m in (trained_model(), model)
        )
        assert rows[name].relative_error == pytest.approx(np.linalg.norm(w - held) / np.linalg.norm(w), rel=1e-4)
        assert rows[name].bytes == nbytes(values[name])
        assert (" x " in rows[name].format) == (len(set(formats)) > 1)
    solved = {(row.weight, row.layer): row.format for row in ledger.layers}
    assert len(solved) == 4 * 7
    stored = json.loads(json.dumps(ledger.to_dict()))["allocation"]
    assert stored["budget"] == allocation.budget and stored["loss"] == allocation.loss > 0
    for choice in stored["choices"]:
        assert choice["layer"] is None or solved[choice["weight"], choice["layer"]] == choice["format"]
        kept = {name: choice[name] for name in ("format", "bytes", "loss")}
        assert kept in choice["candidates"] and len(choice["candidates"]) == (2 if choice["weight"] == "embed" else 4)


@pytest.mark.parametrize("width", [60, 200])
def test_the_table_has_a_row_a_weight(mixed: tuple[Transformer, Ledger], width: int) -> None:
    allocation = mixed[1].allocation
    assert allocation is not None
    console = Console(width=width, file=io.StringIO())
    console.print(allocation.table())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width and "nats a token" in text
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert [name for name, _, _ in rows if name] == list(allocation.formats)
    if width == 200:
        for name, formats, _ in rows:
            chosen = allocation.formats[name]
            assert {part.rpartition(": ")[0] or part for part in formats.split("; ")} == set(map(name_format, chosen))
            for part in formats.split("; ") if len(chosen) > 1 else ():
                kind, _, layers = part.rpartition(": ")
                assert layers == name_ranges([i for i, format in enumerate(chosen) if name_format(format) == kind])


UNIFORM = [
    (Int4Config(group=64), Int4Config(group=64)),
    (NMInt4Config(n=2, m=4, group=64), Int8Config()),
    (TernaryConfig(group=64), Int8Config()),
]


@pytest.mark.parametrize("solver", [NearestConfig(), FeedbackConfig()], ids=lambda solver: solver.kind)
@pytest.mark.parametrize(("blocks", "table"), UNIFORM, ids=["int4", "nm_int4", "ternary"])
def test_at_equal_bytes_the_divergence_is_below_that_of_one_format(blocks, table, solver) -> None:
    """On text that neither training nor calibration saw; `-s` prints the numbers.

    int4 everywhere is near to the best that these candidates give for its bytes: there the divergence from the dense
    model, which is what a budget is spent on, has to be less. Losses differ by less than that divergence, and either
    way: what of it makes a model surer or less sure than it should be, which another training turns around.
    """
    uniform, wanted = run(make_uniform(blocks, table, solver))
    model, ledger = run(make_recipe(solver, bytes=wanted.bytes))
    assert ledger.bytes <= wanted.bytes
    dense, before, after = (np.asarray(unseen_losses(m), np.float64) for m in (trained_model(), uniform, model))
    better = before - after
    spread = better.std() / len(better) ** 0.5
    tokens = jnp.asarray(unseen_windows())
    gaps = [float(divergence(trained_model(), m, tokens)) for m in (uniform, model)]
    means = [losses.mean() for losses in (dense, before, after)]
    print(
        f"\n{solver.kind} {wanted.bits_per_weight:.2f} bits: loss {means[0]:.4f} dense, {means[1]:.4f} uniform, "
        f"{means[2]:.4f} here, {better.mean():.4f} (+- {spread:.4f}) better; "
        f"divergence {gaps[0]:.4f} uniform, {gaps[1]:.4f} here"
    )
    if isinstance(blocks, Int4Config):
        assert gaps[1] <= gaps[0] and better.mean() > -gaps[0]
    else:
        assert better.mean() > 10 * spread and gaps[1] < 0.8 * gaps[0]


def test_more_bytes_give_less_loss() -> None:
    found = [run(make_recipe(FeedbackConfig(), bits_per_weight=bits)) for bits in (3.0, 3.5, 5.0)]
    losses = [float(jnp.mean(unseen_losses(model))) for model, _ in found]
    assert losses == sorted(losses, reverse=True)
    forecasts = [ledger.allocation.loss for _, ledger in found if ledger.allocation is not None]
    assert forecasts == sorted(forecasts, reverse=True) and len(forecasts) == 3


def test_a_budget_for_everything_takes_the_best_of_everything() -> None:
    _, ledger = run(make_recipe(FeedbackConfig(), bits_per_weight=32.0))
    assert ledger.allocation is not None
    assert set(ledger.allocation.formats.values()) == {(Int8Config(),) * 4, (Int8Config(),)}
    assert ledger.bytes == ledger.allocation.most < ledger.allocation.budget


def test_trials_without_the_solver_are_of_plain_rounding() -> None:
    plain, solved = (
        run(make_recipe(FeedbackConfig(), bits_per_weight=3.5, trial=trial))[1].allocation
        for trial in ("nearest", "solver")
    )
    rounded = run(make_recipe(NearestConfig(), bits_per_weight=3.5))[1].allocation
    assert plain is not None and solved is not None and rounded is not None
    assert plain.items == rounded.items != solved.items


def test_dense_candidates_and_fixed_rules_stand_beside() -> None:
    blocks = (DenseConfig(dtype="bfloat16"), Int4Config(group=64))
    recipe = RecipeConfig(
        rules=(
            Rule(pattern="layers.mlp.down", format=blocks, solver=FeedbackConfig()),
            Rule(pattern="layers.*", format=Int8Config(), solver=FeedbackConfig()),
        ),
        calibration=CALIBRATION,
        allocation=AllocationConfig(bits_per_weight=9.9, windows=16),
    )
    model, ledger = run(recipe)
    assert ledger.allocation is not None and len(ledger.allocation.items) == 4
    formats = ledger.allocation.formats["layers.mlp.down"]
    assert set(formats) == set(blocks), formats
    for row in ledger.layers:
        dense = row.weight == "layers.mlp.down" and formats[row.layer] == blocks[0]
        assert (row.damping is None) == dense and not row.note and (row.format == "bfloat16") == dense
    assert ledger.bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(model)) <= ledger.allocation.budget
    rest = sum(row.bytes for row in ledger.rows if row.weight != "layers.mlp.down")
    smallest = 4 * 4.25 * 192 * 64 / 8
    assert ledger.allocation.least == rest + smallest


def price_tables(model: Transformer, solver: FeedbackConfig | NearestConfig) -> tuple[Transformer, Ledger]:
    """Of tables alone, whose formats are chosen."""
    recipe = RecipeConfig(
        rules=(
            Rule(pattern="layers.*", format=DenseConfig(dtype="float32")),
            Rule(
                pattern="*embed", format=(Int8Config(), Int4OffsetConfig(group=32), Int4Config(group=64)), solver=solver
            ),
        ),
        calibration=CALIBRATION,
        allocation=AllocationConfig(bits_per_weight=32.0, windows=32),
    )
    budget = AllocationConfig(bytes=count_least_but(model, recipe), windows=32)
    return compress(model, dataclasses.replace(recipe, allocation=budget), calibration=calibration_windows())


def count_least_but(model: Transformer, recipe: RecipeConfig) -> int:
    """Bytes with which one table may have five bits, or all have four."""
    shapes = {name: param.get_value() for name, param in named_weights(model).items()}
    least = count_least(shapes, {name: rule.formats for name, rule in plan_recipe(recipe, model).rules.items()})
    return least + shapes["embed"].size // 8


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_tables_that_are_multiplied_by_are_priced_as_they_will_be_solved(tied: bool) -> None:
    """What is only looked up is rounded, and priced so; a head costs less than rounded, in every format. One that is
    looked up as well may cost more there than it gains."""
    model = trained_model()
    if not tied:
        config = dataclasses.replace(model.config, tie_embeddings=False)
        untied = Transformer(config, rngs=nnx.Rngs(0))
        given = {name: param.get_value() for name, param in named_weights(model).items()}
        model = replace_weights(untied, given | {"unembed": given["embed"]})
    head = "embed" if tied else "unembed"
    found, ledger = price_tables(model, FeedbackConfig())
    _, rounded = price_tables(model, NearestConfig())
    assert ledger.allocation is not None and rounded.allocation is not None
    pairs = {
        one.weight: (one.options, other.options)
        for one, other in zip(ledger.allocation.items, rounded.allocation.items, strict=True)
    }
    assert set(pairs) == ({"embed"} if tied else {"embed", "unembed"})
    for name, (solved, plain) in pairs.items():
        for one, other in zip(solved, plain, strict=True):
            assert one.bytes == other.bytes
            if name != head:
                assert one.loss == other.loss
            elif tied:
                assert one.loss != other.loss and 0.5 < one.loss / other.loss < 1.5
            else:
                assert one.loss < 0.95 * other.loss
    assert [row.weight for row in ledger.layers if row.layer is None] == [head]
    (row,) = [row for row in ledger.layers if row.layer is None]
    assert row.damping is not None and row.output_error is not None
    chosen = dict(zip(pairs, ledger.allocation.options, strict=True))[head]
    w, value = (named_weights(m)[head].get_value() for m in (model, found))
    assert is_packed_as(value, chosen.format) and chosen.format != Int8Config()
    assert not np.array_equal(to_dense(value), to_dense(pack_weight(w, chosen.format)))


def test_what_cannot_be_is_refused_before_any_work() -> None:
    done: list[int] = []
    for recipe, message in [
        (make_recipe(FeedbackConfig(), bytes=10_000), r"a budget of 10,000 bytes cannot be met: .* [0-9,]+ bytes"),
        (make_recipe(FeedbackConfig(), bits_per_weight=2.0), "cannot be met"),
    ]:
        with pytest.raises(InputError, match=message):
            compress(trained_model(), recipe, calibration=calibration_windows(), progress=lambda *_: done.append(1))
    assert not done
    # The least that is named is a budget that can be met.
    with pytest.raises(InputError) as error:
        plan_recipe(make_recipe(FeedbackConfig(), bytes=1), trained_model())
    least = int(str(error.value).split("the model has ")[1].split(" bytes")[0].replace(",", ""))
    plan_recipe(make_recipe(FeedbackConfig(), bytes=least), trained_model())
    with pytest.raises(InputError, match=f"{least:,}"):
        plan_recipe(make_recipe(FeedbackConfig(), bytes=least - 1), trained_model())
    _, ledger = run(make_recipe(NearestConfig(), bytes=least))
    assert ledger.bytes == least


def test_recipes_that_choose_nothing_or_without_a_budget_are_refused() -> None:
    both = Rule(pattern="layers.*", format=BLOCKS)
    one = Rule(pattern="*", format=Int8Config())
    budget = AllocationConfig(bits_per_weight=4.0, windows=16)
    for fields, message in [
        ({"rules": (both,)}, r"rule 'layers.\*' leaves a choice of formats, which needs a budget"),
        ({"rules": (one,), "calibration": CALIBRATION, "allocation": budget}, "there is nothing to choose"),
        ({"rules": (both,), "allocation": budget}, "an allocation measures sensitivities, which needs a calibration"),
        (
            {"rules": (both,), "calibration": CalibrationConfig(tokens=512, sequence_length=64), "allocation": budget},
            "allocation.windows=16 must be a multiple of calibration.batch=4, and at most the 8 windows",
        ),
        (
            {
                "rules": (both,),
                "calibration": CALIBRATION,
                "allocation": AllocationConfig(bits_per_weight=4.0, windows=24),
            },
            "allocation.windows=24 must be a multiple of calibration.batch=16, and at most the 128 windows",
        ),
    ]:
        with pytest.raises(InputError, match=message):
            RecipeConfig(**fields)
    for formats in ((), (Int8Config(),), (Int8Config(), Int4Config(), Int8Config())):
        with pytest.raises(InputError, match="leave nothing to choose"):
            Rule(pattern="*", format=formats)
    with pytest.raises(InputError, match="int8, int4 prunes nothing"):
        Rule(pattern="*", format=TABLES, solver=FeedbackConfig(mask="wanda"))
    Rule(pattern="*", format=BLOCKS, solver=FeedbackConfig(mask="wanda"))  # one of them prunes
