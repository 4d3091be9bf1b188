"""Rules by name, the first that matches; a rule without effect, and a format that does not fit, are refused."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import pytest

from hsai.compress.allocate import AllocationConfig
from hsai.compress.calibration import CalibrationConfig
from hsai.compress.recipe import RecipeConfig, Rule, match_weights, reads_calibration
from hsai.compress.scaling import ScalingConfig
from hsai.compress.solvers import FeedbackConfig, NearestConfig
from hsai.config import RunConfig
from hsai.config_file import load_config
from hsai.configuration import from_dict, to_dict
from hsai.errors import InputError
from hsai.formats import (
    DenseConfig,
    Int2Config,
    Int3Config,
    Int4Config,
    Int4OffsetConfig,
    Int8Config,
    NMConfig,
    NMInt4Config,
    NMInt8Config,
    OutliersConfig,
    TernaryConfig,
    UnstructuredConfig,
    UnstructuredInt4Config,
    VNMInt4Config,
    VNMInt8Config,
)
from hsai.formats.storage import named_weights, replace_weights
from hsai.models import MoEConfig, TransformerConfig
from hsai.models.layers import is_matrix
from hsai.models.transformer import abstract_transformer

RECIPES = Path(__file__).parents[2] / "configs" / "compress"
CONFIG = TransformerConfig(
    vocab=96, embed=64, layers=2, heads=2, kv_heads=1, head_dim=32, mlp=128, max_length=32, qk_norm=True
)
MODEL = abstract_transformer(CONFIG)
MATRICES = ["embed", *(f"layers.attention.{w}" for w in "koqv"), *(f"layers.mlp.{w}" for w in ("down", "gate", "up"))]


BUDGET_TABLES = (
    Int8Config(),
    Int4OffsetConfig(group=32),
    Int4Config(group=32),
    Int4Config(group=64),
    Int3Config(group=64),
    Int2Config(group=64),
)
BUDGET_BLOCKS = (
    *BUDGET_TABLES[:4],
    NMInt4Config(n=4, m=8, group=64),
    Int3Config(group=64),
    NMInt4Config(n=2, m=4, group=64),
    Int2Config(group=64),
    NMInt4Config(n=2, m=8, group=64),
)


def make_recipe(**rules) -> RecipeConfig:
    return RecipeConfig(rules=tuple(Rule(pattern=pattern, format=format) for pattern, format in rules.items()))


def test_matrices_are_what_is_multiplied_by() -> None:
    params = named_weights(MODEL)
    assert [name for name, param in params.items() if is_matrix(param)] == MATRICES
    assert all(name.endswith(".gain") for name in params if name not in MATRICES)


def test_a_star_takes_every_matrix_and_no_gain() -> None:
    assert list(match_weights(make_recipe(**{"*": Int8Config()}), MODEL)) == MATRICES


def test_the_first_rule_wins_and_the_rest_is_left_alone() -> None:
    recipe = make_recipe(**{"layers.mlp.down": NMConfig(), "layers.mlp.*": Int4Config(), "*.[qk]": Int8Config()})
    assert {name: rule.format for name, rule in match_weights(recipe, MODEL).items()} == {
        "layers.attention.k": Int8Config(),
        "layers.attention.q": Int8Config(),
        "layers.mlp.down": NMConfig(),
        "layers.mlp.gate": Int4Config(),
        "layers.mlp.up": Int4Config(),
    }


@pytest.mark.parametrize(
    ("pattern", "near"), [("layers.mpl.down", "layers.mlp.down"), ("unembed", "embed"), ("LAYERS.*", "layers.")]
)
def test_a_rule_that_matches_nothing_names_the_nearest(pattern: str, near: str) -> None:
    with pytest.raises(InputError, match="matches no weight; the nearest are ") as error:
        match_weights(make_recipe(**{"*": Int8Config(), pattern: Int4Config()}), MODEL)
    assert repr(pattern) in str(error.value) and near in str(error.value).split("nearest are")[1]


def test_gains_cannot_be_compressed() -> None:
    with pytest.raises(InputError, match=r"rule 'layers.mlp_norm.gain' matches no weight"):
        match_weights(make_recipe(**{"layers.mlp_norm.gain": Int8Config()}), MODEL)


@pytest.mark.parametrize("later", ["embed", "*"])
def test_a_rule_behind_one_that_takes_all_is_refused(later: str) -> None:
    rules = (Rule(pattern="*", format=Int8Config()), Rule(pattern=later, format=Int4Config()))
    with pytest.raises(InputError, match="is never reached: an earlier rule, '\\*', decides for 'embed'"):
        match_weights(RecipeConfig(rules=rules), MODEL)


def test_the_same_rule_twice_is_refused() -> None:
    rule = Rule(pattern="*", format=Int8Config())
    with pytest.raises(InputError, match="is never reached"):
        match_weights(RecipeConfig(rules=(rule, rule)), MODEL)


def test_a_format_that_does_not_divide_names_weight_shape_and_numbers() -> None:
    with pytest.raises(InputError) as error:
        match_weights(make_recipe(**{"layers.*": Int4Config(group=128)}), MODEL)
    assert str(error.value) == (
        "layers.attention.k: int4 with groups of 128 needs a contraction that is a multiple of 128; "
        "a weight of shape (2, 64, 32) has 64"
    )


def test_a_weight_that_is_packed_already_is_refused() -> None:
    weights = named_weights(MODEL)
    packed = Int8Config().pack(jnp.ones(weights["embed"].get_value().shape))
    with pytest.raises(InputError, match="embed is int8 already; compress the dense checkpoint instead"):
        match_weights(make_recipe(embed=Int4Config()), replace_weights(MODEL, {"embed": packed}))


def test_empty_recipes_and_patterns_are_refused() -> None:
    with pytest.raises(InputError, match="compresses nothing"):
        RecipeConfig(rules=())
    with pytest.raises(InputError, match="'' matches no weight"):
        Rule(pattern="", format=Int8Config())


@pytest.mark.parametrize(
    ("name", "embedding", "blocks", "parent"),
    [
        ("bf16", DenseConfig(dtype="bfloat16"), DenseConfig(dtype="bfloat16"), None),
        ("int8", Int8Config(), Int8Config(), None),
        ("int4", Int4Config(group=64), Int4Config(group=64), None),
        ("nm24", Int8Config(), NMConfig(n=2, m=4), "int8"),
        ("nm24_int8", Int8Config(), NMInt8Config(n=2, m=4), "nm24"),
        ("nm24_int4", Int8Config(), NMInt4Config(n=2, m=4, group=64), "nm24"),
        ("nm28_int4", Int8Config(), NMInt4Config(n=2, m=8, group=64), "nm24"),
        ("nm48_int4", Int8Config(), NMInt4Config(n=4, m=8, group=64), "nm24"),
        ("ternary", Int8Config(), TernaryConfig(group=64), "nm24"),
        ("vnm28_int4", Int8Config(), VNMInt4Config(v=64, n=2, m=8, group=64), "nm24"),
        ("int3", Int4Config(group=64), Int3Config(group=64), "int4"),
        ("int2", Int4Config(group=64), Int2Config(group=64), "int4"),
        ("int4_offset", Int4OffsetConfig(group=32), Int4OffsetConfig(group=32), "int4"),
        ("gptq_int4", Int4Config(group=64), Int4Config(group=64), "int4"),
        ("gptq_int4_g128", Int4Config(group=128), Int4Config(group=128), "gptq_int4"),
        ("gptq_int4_offset", Int4OffsetConfig(group=32), Int4OffsetConfig(group=32), "int4_offset"),
        ("gptq_int3", Int4Config(group=64), Int3Config(group=64), "int3"),
        ("gptq_int2", Int4Config(group=64), Int2Config(group=64), "int2"),
        ("gptq_order_int4", Int4Config(group=64), Int4Config(group=64), "gptq_int4"),
        ("hqq_int4", Int4Config(group=64), Int4Config(group=64), "int4"),
        ("hqq_int4_offset", Int4OffsetConfig(group=32), Int4OffsetConfig(group=32), "int4_offset"),
        ("awq_int4", Int4Config(group=64), Int4Config(group=64), "int4"),
        ("quarot_int4", Int4Config(group=64), Int4Config(group=64), "gptq_int4"),
        ("joint_nm24", Int8Config(), NMConfig(n=2, m=4), "nm24"),
        ("wanda_nm24", Int8Config(), NMConfig(n=2, m=4), "nm24"),
        ("wanda_updated_nm24", Int8Config(), NMConfig(n=2, m=4), "joint_nm24"),
        ("joint_nm28_int4", Int8Config(), NMInt4Config(n=2, m=8, group=64), "nm28_int4"),
        ("joint_nm24_int8", Int8Config(), NMInt8Config(n=2, m=4), "nm24_int8"),
        ("joint_nm24_int4", Int8Config(), NMInt4Config(n=2, m=4, group=64), "nm24_int4"),
        ("joint_nm48_int4", Int8Config(), NMInt4Config(n=4, m=8, group=64), "nm48_int4"),
        ("joint_vnm28_int4", Int8Config(), VNMInt4Config(v=64, n=2, m=8, group=64), "vnm28_int4"),
        ("vnm28_int8", Int8Config(), VNMInt8Config(v=64, n=2, m=8), "nm24"),
        ("sparse50", Int8Config(), UnstructuredConfig(density=0.5, block=64), "nm24"),
        ("sparse50_int4", Int8Config(), UnstructuredInt4Config(density=0.5, block=64, group=64), "nm24"),
        ("joint_sparse50", Int8Config(), UnstructuredConfig(density=0.5, block=64), "sparse50"),
        (
            "joint_sparse50_int4",
            Int8Config(),
            UnstructuredInt4Config(density=0.5, block=64, group=64),
            "sparse50_int4",
        ),
        ("outliers_int3", Int4Config(group=64), OutliersConfig(base=Int3Config(group=64), share=0.01), "int3"),
        (
            "gptq_outliers_int3",
            Int4Config(group=64),
            OutliersConfig(base=Int3Config(group=64), share=0.01),
            "outliers_int3",
        ),
        ("budget", BUDGET_TABLES, BUDGET_BLOCKS, None),
        ("tuned_int4", Int4Config(group=64), Int4Config(group=64), "gptq_int4"),
        ("tuned_int4_offset", Int4OffsetConfig(group=32), Int4Config(group=64), "tuned_int4"),
        ("q4_1", Int8Config(), Int4OffsetConfig(group=32), "int4_offset"),
        ("tuned_nm24_int4", Int8Config(), NMInt4Config(n=2, m=4, group=64), "joint_nm24_int4"),
        ("learned_nm24_int4", Int8Config(), NMInt4Config(n=2, m=4, group=64), "tuned_nm24_int4"),
        ("tuned_budget", BUDGET_TABLES, BUDGET_BLOCKS, "budget"),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_recipes_fit_models_and_survive_json(name: str, embedding, blocks, parent: str | None, tied: bool) -> None:
    loaded = load_config(RECIPES / f"{name}.py", RecipeConfig)
    assert loaded.parent_name == parent
    assert from_dict(RecipeConfig, to_dict(loaded.config)) == loaded.config
    config = dataclasses.replace(CONFIG, embed=128, head_dim=64, kv_heads=2, tie_embeddings=tied)
    model = abstract_transformer(config)  # outputs in blocks of 64 fit, and contractions in blocks of 128
    formats = {name: rule.format for name, rule in match_weights(loaded.config, model).items()}
    tables = ("embed",) if tied and name != "quarot_int4" else ("embed", "unembed")
    assert set(formats) == {*MATRICES, *tables}
    assert {formats.pop(table) for table in tables} == {embedding}
    assert set(formats.values()) == {blocks}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.py")), ids=lambda path: path.stem)
def test_windows_fit_the_models_that_docstrings_name(path: Path) -> None:
    """Each says `hsai compress runs/quickstart --recipe` itself."""
    assert f"hsai compress runs/quickstart --recipe configs/compress/{path.name}" in path.read_text()
    recipe = load_config(path, RecipeConfig).config
    model = load_config(RECIPES.parent / "quickstart.py", RunConfig).config.model
    assert recipe.calibration is None or recipe.calibration.sequence_length <= model.max_length
    match_weights(recipe, abstract_transformer(model))


@pytest.mark.parametrize("make", [Int4Config, Int3Config, Int2Config])
def test_groups_and_the_contractions_of_smollm2(make: type) -> None:
    """576 is nine groups of 64, and four and a half of 128."""
    config = dataclasses.replace(CONFIG, embed=576, mlp=1536, heads=9, kv_heads=3, head_dim=64)
    model = abstract_transformer(config)
    for group in (32, 64):
        assert len(match_weights(make_recipe(**{"*": make(group=group)}), model)) == len(MATRICES)
    message = rf"^embed: {make().format} with groups of 128 needs .* multiple of 128; .* shape \(576, 96\) has 576$"
    with pytest.raises(InputError, match=message):
        match_weights(make_recipe(**{"*": make(group=128)}), model)


def test_a_target_must_have_a_kernel_for_every_format() -> None:
    """Refused before any work, with what that platform has for such a weight."""
    with pytest.raises(InputError) as error:
        match_weights(make_recipe(**{"layers.mlp.*": NMInt8Config(n=2)}), MODEL, "gpu")
    assert str(error.value) == (
        "layers.mlp.down: no kernel for gpu multiplies by 2:4 int8: has floating values and int4 words, not int8 "
        "values; there are such for int8, int4 g64, int4_offset g32, 2:4 bfloat16, 2:4 int4 g64, 64:2:8 bfloat16, "
        "64:2:8 int4 g128"
    )
    recipe = RecipeConfig(
        rules=(Rule(pattern="layers.mlp.up", format=(Int4Config(), UnstructuredInt4Config())),),
        calibration=CalibrationConfig(),
        allocation=AllocationConfig(bits_per_weight=31),
    )
    with pytest.raises(InputError, match="layers.mlp.up: no kernel for cpu .* unstructured 32:64 int4 g64: .*rebuild"):
        match_weights(recipe, MODEL, "cpu")
    fine = make_recipe(**{"embed": OutliersConfig(base=Int8Config()), "layers.*": NMInt8Config(n=2)})
    assert list(match_weights(fine, MODEL, "cpu")) == MATRICES


def test_experts_have_no_kernel() -> None:
    """Their weights are made dense for every product, whatever the format; the rest of such a model has kernels."""
    model = abstract_transformer(dataclasses.replace(CONFIG, moe=MoEConfig(experts=4, active=2)))
    for target in ("cpu", "gpu", "tpu"):
        for format in (Int4Config(), OutliersConfig(base=Int8Config())):
            with pytest.raises(InputError) as error:
                match_weights(make_recipe(**{"*": format}), model, target)
            assert str(error.value).startswith(f"layers.mlp.down: no kernel for {target} multiplies by ")
            assert str(error.value).endswith(
                ": it is of experts, whose products read dense weights alone; there are such for no packed format"
            )
    match_weights(make_recipe(**{"layers.mlp.router": Int8Config(), "layers.attention.*": Int4Config()}), model, "cpu")
    match_weights(make_recipe(**{"*": DenseConfig()}), model, "cpu")


def test_a_table_that_is_looked_up_needs_no_kernel() -> None:
    untied = abstract_transformer(dataclasses.replace(CONFIG, tie_embeddings=False))
    recipe = make_recipe(embed=UnstructuredInt4Config(), **{"*": Int8Config()})
    assert "unembed" in match_weights(recipe, untied, "cpu")
    with pytest.raises(InputError, match="^embed: no kernel for cpu"):
        match_weights(recipe, MODEL, "cpu")
    with pytest.raises(InputError, match="^unembed: no kernel for cpu"):
        match_weights(make_recipe(unembed=UnstructuredInt4Config(), **{"*": Int8Config()}), untied, "cpu")


def test_what_is_in_its_format_reads_no_calibration() -> None:
    packed = Int4Config(group=32).pack(jnp.ones((2, 64, 128)))
    model = replace_weights(MODEL, {"layers.mlp.up": packed})
    rules = (Rule(pattern="layers.mlp.up", format=Int4Config(group=32), solver=FeedbackConfig()),)
    kept = RecipeConfig(rules=rules, calibration=CalibrationConfig())
    assert reads_calibration(kept, MODEL) and not reads_calibration(kept, model)
    more = Rule(pattern="layers.mlp.down", format=Int4Config(group=32), solver=FeedbackConfig())
    assert reads_calibration(dataclasses.replace(kept, rules=(*rules, more)), model)
    plain = dataclasses.replace(more, solver=NearestConfig())
    assert not reads_calibration(dataclasses.replace(kept, rules=(*rules, plain)), model)
    chosen = dataclasses.replace(plain, format=(Int8Config(), Int4Config(group=32)))
    budget = AllocationConfig(bits_per_weight=31)
    assert reads_calibration(dataclasses.replace(kept, rules=(*rules, chosen), allocation=budget), model)
    scaled = RecipeConfig(rules=(plain,), calibration=CalibrationConfig(), transforms=(ScalingConfig(),))
    assert reads_calibration(scaled, MODEL)


def test_every_recipe_is_tested_and_says_how_to_run_it() -> None:
    names = {path.stem for path in RECIPES.glob("*.py")}
    plain = {
        "bf16",
        "int8",
        "int4",
        "int4_offset",
        "int3",
        "int2",
        "nm24",
        "nm24_int8",
        "nm24_int4",
        "nm28_int4",
        "nm48_int4",
        "outliers_int3",
        "q4_1",
        "sparse50",
        "sparse50_int4",
        "ternary",
        "vnm28_int4",
        "vnm28_int8",
    }
    assert names == plain | {
        "budget",
        "gptq_int4",
        "gptq_int4_g128",
        "gptq_int4_offset",
        "gptq_int3",
        "gptq_int2",
        "gptq_outliers_int3",
        "joint_nm24",
        "joint_nm28_int4",
        "wanda_nm24",
        "wanda_updated_nm24",
        "joint_sparse50",
        "joint_sparse50_int4",
        "gptq_order_int4",
        "hqq_int4",
        "hqq_int4_offset",
        "awq_int4",
        "quarot_int4",
        "joint_nm24_int8",
        "joint_nm24_int4",
        "joint_nm48_int4",
        "joint_vnm28_int4",
        "tuned_int4",
        "tuned_int4_offset",
        "q4_1_offset",
        "tuned_nm24_int4",
        "learned_nm24_int4",
        "learned_nm24_int4_offset",
        "tuned_budget",
    }
    for name in names:
        text = (RECIPES / f"{name}.py").read_text()
        assert (
            f"hsai compress runs/quickstart --recipe configs/compress/{name}.py --out runs/quickstart/{name}\n" in text
        )
