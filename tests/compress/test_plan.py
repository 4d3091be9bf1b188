"""A recipe's plan for a model: the first rule that matches; what has no effect, does not fit, or has no kernel."""

import dataclasses

import jax.numpy as jnp
import pytest

from hsai.compress.allocate import AllocationConfig
from hsai.compress.calibration import CalibrationConfig
from hsai.compress.plain import NearestConfig
from hsai.compress.plan import check_kernels, plan_recipe
from hsai.compress.recipe import RecipeConfig, Rule
from hsai.compress.scaling import ScalingConfig
from hsai.compress.solvers import FeedbackConfig
from hsai.errors import InputError
from hsai.formats import (
    DenseConfig,
    Int2Config,
    Int3Config,
    Int4Config,
    Int8Config,
    NMConfig,
    NMInt8Config,
    OutliersConfig,
    UnstructuredInt4Config,
    VNMInt4Config,
)
from hsai.formats.storage import named_weights, replace_weights
from hsai.models import MoEConfig
from hsai.models.layers import is_matrix
from hsai.models.transformer import abstract_transformer
from tests.compress.test_recipe import CONFIG, MATRICES, MODEL, make_recipe


def test_matrices_are_what_is_multiplied_by() -> None:
    params = named_weights(MODEL)
    assert [name for name, param in params.items() if is_matrix(param)] == MATRICES
    assert all(name.endswith(".gain") for name in params if name not in MATRICES)


def test_a_star_takes_every_matrix_and_no_gain() -> None:
    assert list(plan_recipe(make_recipe(**{"*": Int8Config()}), MODEL).rules) == MATRICES


def test_the_first_rule_wins_and_the_rest_is_left_alone() -> None:
    recipe = make_recipe(**{"layers.mlp.down": NMConfig(), "layers.mlp.*": Int4Config(), "*.[qk]": Int8Config()})
    assert {name: rule.format for name, rule in plan_recipe(recipe, MODEL).rules.items()} == {
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
        plan_recipe(make_recipe(**{"*": Int8Config(), pattern: Int4Config()}), MODEL)
    assert repr(pattern) in str(error.value) and near in str(error.value).split("nearest are")[1]


def test_gains_cannot_be_compressed() -> None:
    with pytest.raises(InputError, match=r"rule 'layers.mlp_norm.gain' matches no weight"):
        plan_recipe(make_recipe(**{"layers.mlp_norm.gain": Int8Config()}), MODEL)


@pytest.mark.parametrize("later", ["embed", "*"])
def test_a_rule_behind_one_that_takes_all_is_refused(later: str) -> None:
    rules = (Rule(pattern="*", format=Int8Config()), Rule(pattern=later, format=Int4Config()))
    with pytest.raises(InputError, match="is never reached: an earlier rule, '\\*', decides for 'embed'"):
        plan_recipe(RecipeConfig(rules=rules), MODEL)


def test_the_same_rule_twice_is_refused() -> None:
    rule = Rule(pattern="*", format=Int8Config())
    with pytest.raises(InputError, match="is never reached"):
        plan_recipe(RecipeConfig(rules=(rule, rule)), MODEL)


def test_a_format_that_does_not_divide_names_weight_shape_and_numbers() -> None:
    with pytest.raises(InputError) as error:
        plan_recipe(make_recipe(**{"layers.*": Int4Config(group=128)}), MODEL)
    assert str(error.value) == (
        "layers.attention.k: int4 with groups of 128 needs a contraction that is a multiple of 128; "
        "a weight of shape (2, 64, 32) has 64"
    )


def test_a_weight_that_is_packed_already_is_refused() -> None:
    weights = named_weights(MODEL)
    packed = Int8Config().pack(jnp.ones(weights["embed"].get_value().shape))
    with pytest.raises(InputError, match="embed is int8 already; compress the dense checkpoint instead"):
        plan_recipe(make_recipe(embed=Int4Config()), replace_weights(MODEL, {"embed": packed}))


@pytest.mark.parametrize("make", [Int4Config, Int3Config, Int2Config])
def test_groups_and_the_contractions_of_smollm2(make: type) -> None:
    """576 is nine groups of 64, and four and a half of 128."""
    config = dataclasses.replace(CONFIG, embed=576, mlp=1536, heads=9, kv_heads=3, head_dim=64)
    model = abstract_transformer(config)
    for group in (32, 64):
        assert len(plan_recipe(make_recipe(**{"*": make(group=group)}), model).rules) == len(MATRICES)
    message = rf"^embed: {make().format} with groups of 128 needs .* multiple of 128; .* shape \(576, 96\) has 576$"
    with pytest.raises(InputError, match=message):
        plan_recipe(make_recipe(**{"*": make(group=128)}), model)


def test_a_target_must_have_a_kernel_for_every_format() -> None:
    """Refused before any work, with what that platform has for such a weight."""
    with pytest.raises(InputError) as error:
        check_kernels(plan_recipe(make_recipe(**{"layers.mlp.*": NMInt8Config(n=2)}), MODEL), "gpu")
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
        check_kernels(plan_recipe(recipe, MODEL), "cpu")
    fine = make_recipe(**{"embed": OutliersConfig(base=Int8Config()), "layers.*": NMInt8Config(n=2)})
    plan = plan_recipe(fine, MODEL)
    check_kernels(plan, "cpu")
    assert list(plan.multiplied) == MATRICES


def test_experts_have_no_kernel() -> None:
    """Their weights are made dense for every product, whatever the format; the rest of such a model has kernels."""
    model = abstract_transformer(dataclasses.replace(CONFIG, moe=MoEConfig(experts=4, active=2)))
    for target in ("cpu", "gpu", "tpu"):
        for format in (Int4Config(), OutliersConfig(base=Int8Config())):
            with pytest.raises(InputError) as error:
                check_kernels(plan_recipe(make_recipe(**{"*": format}), model), target)
            assert str(error.value).startswith(f"layers.mlp.down: no kernel for {target} multiplies by ")
            assert str(error.value).endswith(
                ": it is of experts, whose products read dense weights alone; there are such for no packed format"
            )
    fine = make_recipe(**{"layers.mlp.router": Int8Config(), "layers.attention.*": Int4Config()})
    check_kernels(plan_recipe(fine, model), "cpu")
    check_kernels(plan_recipe(make_recipe(**{"*": DenseConfig()}), model), "cpu")


def test_a_table_that_is_looked_up_needs_no_kernel() -> None:
    untied = abstract_transformer(dataclasses.replace(CONFIG, tie_embeddings=False))
    recipe = make_recipe(embed=UnstructuredInt4Config(), **{"*": Int8Config()})
    plan = plan_recipe(recipe, untied)
    check_kernels(plan, "cpu")
    assert {"embed", "unembed"} <= set(plan.rules) and "embed" not in plan.multiplied
    assert plan.multiplied["unembed"] == (64, 96) and plan.multiplied["layers.mlp.up"] == (2, 64, 128)
    with pytest.raises(InputError, match="^embed: no kernel for cpu"):
        check_kernels(plan_recipe(recipe, MODEL), "cpu")
    with pytest.raises(InputError, match="^unembed: no kernel for cpu"):
        check_kernels(plan_recipe(make_recipe(unembed=UnstructuredInt4Config(), **{"*": Int8Config()}), untied), "cpu")


def test_what_is_in_its_format_reads_no_calibration() -> None:
    packed = Int4Config(group=32).pack(jnp.ones((2, 64, 128)))
    model = replace_weights(MODEL, {"layers.mlp.up": packed})
    rules = (Rule(pattern="layers.mlp.up", format=Int4Config(group=32), solver=FeedbackConfig()),)
    kept = RecipeConfig(rules=rules, calibration=CalibrationConfig())
    assert plan_recipe(kept, MODEL).reads_text and not plan_recipe(kept, model).reads_text
    more = Rule(pattern="layers.mlp.down", format=Int4Config(group=32), solver=FeedbackConfig())
    assert plan_recipe(dataclasses.replace(kept, rules=(*rules, more)), model).reads_text
    plain = dataclasses.replace(more, solver=NearestConfig())
    assert not plan_recipe(dataclasses.replace(kept, rules=(*rules, plain)), model).reads_text
    chosen = dataclasses.replace(plain, format=(Int8Config(), Int4Config(group=32)))
    budget = AllocationConfig(bits_per_weight=31)
    assert plan_recipe(dataclasses.replace(kept, rules=(*rules, chosen), allocation=budget), model).reads_text
    scaled = RecipeConfig(rules=(plain,), calibration=CalibrationConfig(), transforms=(ScalingConfig(),))
    assert plan_recipe(scaled, MODEL).reads_text


def test_a_router_stays_as_it_is_unless_a_pattern_names_it() -> None:
    """Eight outputs would fit no block of 64 either."""
    model = abstract_transformer(dataclasses.replace(CONFIG, moe=MoEConfig(experts=8, active=2)))
    for pattern in ("*", "layers.*", "layers.mlp.*"):
        assert "layers.mlp.router" not in plan_recipe(make_recipe(**{pattern: Int8Config()}), model).rules
    blocks = {"layers.mlp.[dgu]*": VNMInt4Config(v=64, n=2, m=8, group=64), "layers.*": NMConfig()}
    assert "layers.mlp.router" not in plan_recipe(make_recipe(**blocks), model).rules
    for pattern in ("layers.mlp.router", "*router*"):
        rules = plan_recipe(make_recipe(**{pattern: Int8Config(), "*": Int4Config()}), model).rules
        assert rules["layers.mlp.router"].format == Int8Config() and rules["layers.mlp.up"].format == Int4Config()
    with pytest.raises(InputError, match="matches no weight but layers.mlp.router, which stays as it is"):
        plan_recipe(make_recipe(**{"layers.mlp.r*": Int8Config()}), model)
