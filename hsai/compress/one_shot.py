"""One-shot compression: formats for the weights of a model, without training it.

What a recipe's rules leave to the nearest solver is packed here, from the weights alone; what they decide over
calibration is in `hsai.compress.calibrated`.

All that can be wrong with the input is found before the first weight is touched; and no weight leaves without its bytes
having been counted against what its format promises.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from hsai.compress.allocate import Allocation
from hsai.compress.budget import spend_budget
from hsai.compress.calibrated import SolvedLayers, solve_layers
from hsai.compress.calibration import CalibrationConfig
from hsai.compress.ledger import Ledger, LedgerRow
from hsai.compress.limits import check_finite, check_held, check_range
from hsai.compress.measured import measure_layers
from hsai.compress.names import name_format, name_formats
from hsai.compress.plain import PlainConfig, pack_layers
from hsai.compress.plan import Plan, is_stacked, plan_recipe
from hsai.compress.recipe import RecipeConfig, Rule
from hsai.compress.reconstruct import Reconstructor
from hsai.compress.resume import Workbench
from hsai.compress.solvers import CalibratedConfig
from hsai.compress.stream import Progress
from hsai.compress.transforms import transform_model
from hsai.formats import (
    FormatConfig,
    OutliersConfig,
    Packed,
    Runs,
    Weight,
    nbytes,
    to_dense,
)
from hsai.formats.storage import named_weights, replace_weights
from hsai.models import Transformer

M = TypeVar("M")
Formats = Mapping[str, tuple[FormatConfig, ...]]


def compress(
    model: M,
    recipe: RecipeConfig,
    *,
    calibration: np.ndarray | None = None,
    workbench: Workbench | None = None,
    progress: Progress | None = None,
) -> tuple[M, Ledger]:
    """A copy of the model whose weights have the formats of the recipe, and the ledger of all its parameters.

    Args:
      model: with dense weights, or packed ones that `plan_recipe` lets pass; it is not changed.
      recipe: which weights become what.
      calibration: int32 (N, T) tokens, of `draw_windows`; for recipes that ask for them. Of others it changes nothing:
        the ledger then has the output errors of what was rounded plainly.
      workbench: where what takes long is kept as soon as it is done, and found again by a later run.
      progress: called with ("compressing", weights done, weights in all), and as `stream_blocks` says.
    Raises:
      InputError: see `plan_recipe`, `transform_model`, `check_range`, `solve_layers` and `measure_sensitivities`; or
        a weight holds a NaN or an infinity.
      RuntimeError: a packed weight does not have the bytes that its format promises, a defect of the format.
    """
    plan = plan_recipe(recipe, model)
    if plan.reads_text and calibration is None:
        raise ValueError("this recipe calibrates; compress needs the calibration's tokens")
    check_numbers(model, plan)
    model, scales = transform_model(
        model,
        recipe.transforms,
        {name: rule.formats for name, rule in plan.rules.items()},
        calibration=recipe.calibration,
        tokens=calibration,
        workbench=workbench,
        progress=progress,
    )
    if recipe.transforms:
        check_numbers(model, plan)
    formats, allocation = choose_formats(model, recipe, plan, calibration, workbench=workbench, progress=progress)
    values: dict[str, Weight] = {name: named_weights(model)[name].get_value() for name in plan.kept}
    solved = SolvedLayers(weights={}, rows=(), blocks=())
    if plan.reads_text:
        tables = pack_lookups(model, plan, formats)
        solved = solve_weights(
            model, recipe, plan, formats, tables, calibration, workbench=workbench, progress=progress
        )
        values |= tables
        values |= solved.weights
    values, rows = pack_rest(model, plan, formats, values, progress=progress)
    packed = replace_weights(model, values)
    layers = solved.rows
    if calibration is not None and plan.measured and not plan.reads_text:
        assert isinstance(model, Transformer) and isinstance(packed, Transformer)
        batch = (recipe.calibration or CalibrationConfig()).batch
        measured = {name: formats[name] for name in plan.measured}
        layers = measure_layers(model, packed, measured, calibration, batch=batch, progress=progress)
    return packed, Ledger(rows=rows, layers=layers, blocks=solved.blocks, allocation=allocation, scales=scales)


def check_numbers(model: Any, plan: Plan) -> None:
    """Raises `InputError` for a weight with a NaN or an infinity, or with numbers beyond what its formats hold."""
    for name, param in named_weights(model).items():
        check_finite(name, param.get_value())
        if name in plan.rules:
            check_range(name, param.get_value(), plan.rules[name].formats)


def choose_formats(
    model: Any,
    recipe: RecipeConfig,
    plan: Plan,
    calibration: np.ndarray | None,
    *,
    workbench: Workbench | None,
    progress: Progress | None,
) -> tuple[Formats, Allocation | None]:
    """The format of each layer of every weight of the plan, or the one of a table; and how a budget was spent on it."""
    params = named_weights(model)
    fixed = {name: rule.formats for name, rule in plan.rules.items() if not rule.is_open}
    formats = {
        name: one * (params[name].get_value().shape[0] if is_stacked(name) else 1) for name, one in fixed.items()
    }
    if recipe.allocation is None:
        return formats, None
    assert recipe.calibration is not None and calibration is not None
    allocation = None if workbench is None else workbench.load_allocation()
    if allocation is None:
        allocation = spend_budget(
            model,
            recipe.allocation,
            {name: (rule.formats, rule.solver) for name, rule in plan.rules.items() if rule.is_open},
            fixed,
            calibration,
            batch=recipe.calibration.batch,
            seed=recipe.calibration.seed,
            workbench=workbench,
            progress=progress,
        )
        if workbench is not None:
            workbench.save_allocation(allocation)
    return formats | allocation.formats, allocation


def pack_lookups(model: Any, plan: Plan, formats: Formats) -> dict[str, Weight]:
    """The tables that are rounded by themselves, before the layers: what an embedding gets wrong, those see."""
    return {
        name: pack_layers(to_dense(named_weights(model)[name].get_value()), formats[name], _plain_solver(rule))
        for name, rule in plan.rules.items()
        if name == "embed" and name not in plan.kept and not isinstance(rule.solver, CalibratedConfig)
    }


def solve_weights(
    model: Any,
    recipe: RecipeConfig,
    plan: Plan,
    formats: Formats,
    tables: Mapping[str, Weight],
    calibration: np.ndarray | None,
    *,
    workbench: Workbench | None,
    progress: Progress | None,
) -> SolvedLayers:
    """What calibration decides, and of the layers all that is packed: what is rounded by itself, the layers behind see,
    and its row says how far its outputs moved. `tables`: of `pack_lookups`."""
    assert isinstance(model, Transformer) and recipe.calibration is not None and calibration is not None
    asked = {
        name: (formats[name], rule.solver)
        for name, rule in plan.rules.items()
        if (isinstance(rule.solver, CalibratedConfig) or is_stacked(name)) and name not in plan.kept
    }
    if not asked:
        return SolvedLayers(weights={}, rows=(), blocks=())
    packed = None
    if tables:
        dense = {name: to_dense(named_weights(model)[name].get_value()) for name in tables}
        packed = replace_weights(model, {name: to_dense(tables[name]).astype(w.dtype) for name, w in dense.items()})
    batch, seed = recipe.calibration.batch, recipe.calibration.seed
    tuner = (
        None if recipe.reconstruction is None else Reconstructor(model, recipe.reconstruction, batch=batch, seed=seed)
    )
    return solve_layers(
        model,
        asked,
        calibration,
        batch=batch,
        packed=packed,
        reconstructor=tuner,
        workbench=workbench,
        progress=progress,
    )


def pack_rest(
    model: Any, plan: Plan, formats: Formats, values: Mapping[str, Weight], *, progress: Progress | None
) -> tuple[dict[str, Weight], tuple[LedgerRow, ...]]:
    """`values` with what is not among them packed from the weight alone; and a row for every parameter of the model.

    Raises:
      InputError, RuntimeError: see `check_held` and `check_bytes`.
    """
    packed = dict(values)
    rows: list[LedgerRow] = []
    done = 0
    for name, param in named_weights(model).items():
        before = param.get_value()
        after = before
        # How far a weight that came packed is from what it was made of, nobody knows here.
        error = None if isinstance(before, Packed) else 0.0
        if name in plan.rules:
            if name not in packed:
                packed[name] = pack_layers(to_dense(before), formats[name], _plain_solver(plan.rules[name]))
            after = packed[name]
            check_bytes(name, after, formats[name])
            check_held(name, to_dense(before), after)
            if name not in plan.kept:
                error = float(measure_error(to_dense(before), after))
            done += 1
            if progress is not None:
                progress("compressing", done, len(plan.rules))
        rows.append(
            LedgerRow(
                weight=name,
                format=name_formats(formats[name]) if name in plan.rules else name_format(after),
                shape=tuple(after.shape),
                bytes=nbytes(after),
                relative_error=error,
            )
        )
    return packed, tuple(rows)


@jax.jit
def measure_error(w: jax.Array, packed: Weight) -> jax.Array:
    """||w - packed|| / ||w||, Frobenius norms over all layers, float32 (); of a weight that is zero everywhere, 0."""

    def measure(pair: tuple[jax.Array, Any]) -> tuple[jax.Array, jax.Array]:
        wide, held = pair[0].astype(jnp.float32), to_dense(pair[1]).astype(jnp.float32)
        return jnp.sum(jnp.square(wide - held)), jnp.sum(jnp.square(wide))

    runs = zip(packed.starts, packed.parts, strict=True) if isinstance(packed, Runs) else [(0, packed)]
    missed = whole = jnp.zeros((), jnp.float32)
    for first, part in runs:
        if w.ndim == 2:
            sums = measure((w, part))
        else:  # layer by layer as well: a whole stack made dense again would be the largest array of all
            sums = jax.lax.map(measure, (w[first : first + part.shape[0]], part))
        missed, whole = missed + jnp.sum(sums[0]), whole + jnp.sum(sums[1])
    return jnp.sqrt(jnp.where(whole > 0, missed / whole, 0.0))


def check_bytes(name: str, value: Weight, formats: Sequence[FormatConfig]) -> None:
    """Raises RuntimeError unless the arrays of a packed weight hold exactly the bytes that its formats promise, of
    which each holds for an equal share of it."""
    share, contraction = math.prod(value.shape) // len(formats), value.shape[-2]
    promised = sum(round(format.invariant_bits(contraction) * share) for format in formats) / 8
    matrices = math.prod(value.shape[:-2]) // len(formats)
    promised += (
        sum(format.index_bits(contraction) * matrices for format in formats if isinstance(format, OutliersConfig)) / 8
    )
    if nbytes(value) != promised:
        stated = name_formats(formats)
        raise RuntimeError(f"{name} of shape {tuple(value.shape)} has {nbytes(value)} bytes, {stated} says {promised}")


def _plain_solver(rule: Rule) -> PlainConfig:
    assert not isinstance(rule.solver, CalibratedConfig)
    return rule.solver
