"""Recipes of the catalogue: they fit models, survive JSON, and say how to run them; what none may be is refused."""

import dataclasses
from pathlib import Path

import pytest

from hsai.compress.plan import check_kernels, plan_recipe
from hsai.compress.recipe import RecipeConfig, Rule
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
from hsai.models import TransformerConfig
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
        ("learned_nm24_int4_offset", Int4OffsetConfig(group=32), NMInt4Config(n=2, m=4, group=64), None),
        ("learned_nm24", Int8Config(), NMConfig(n=2, m=4), None),
        ("q4_1_offset", Int4OffsetConfig(group=32), Int4OffsetConfig(group=32), "int4_offset"),
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
    formats = {name: rule.format for name, rule in plan_recipe(loaded.config, model).rules.items()}
    tables = ("embed",) if tied and name != "quarot_int4" else ("embed", "unembed")
    assert set(formats) == {*MATRICES, *tables}
    assert {formats.pop(table) for table in tables} == {embedding}
    assert set(formats.values()) == {blocks}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.py")), ids=lambda path: path.stem)
def test_windows_fit_the_models_that_docstrings_name(path: Path) -> None:
    """Each says its command itself: of formats that no CPU has a kernel for with `--target none`."""
    recipe = load_config(path, RecipeConfig).config
    model = load_config(RECIPES.parent / "quickstart.py", RunConfig).config.model
    assert recipe.calibration is None or recipe.calibration.sequence_length <= model.max_length
    plan, target = plan_recipe(recipe, abstract_transformer(model)), ""
    try:
        check_kernels(plan, "cpu")
    except InputError:
        target = "--target none "
    command = f"hsai compress runs/quickstart --recipe configs/compress/{path.name} {target}"
    assert f"{command}--out runs/quickstart/{path.stem}\n" in path.read_text().replace("\\\\\n    ", "")
    assert bool(target) == ("sparse50" in path.stem)


def test_every_recipe_is_tested() -> None:
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
        "learned_nm24",
        "learned_nm24_int4",
        "learned_nm24_int4_offset",
        "tuned_budget",
    }
