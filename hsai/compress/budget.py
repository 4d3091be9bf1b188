"""A model's bytes against a budget: what it has at least, and how an allocation spends it."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hsai.compress.allocate import Allocation, AllocationConfig, choose
from hsai.compress.plain import NearestConfig
from hsai.compress.resume import Workbench
from hsai.compress.sensitivity import Candidates, measure_sensitivities
from hsai.compress.stream import Progress
from hsai.formats import FormatConfig, Weight, nbytes
from hsai.formats.storage import named_weights
from hsai.models import Transformer

Formats = Mapping[str, Sequence[FormatConfig]]


def count_least(weights: Mapping[str, Weight], formats: Formats) -> int:
    """Bytes of all `weights` (arrays or their shapes, by name), each in the smallest of its formats, if it has any."""
    return sum(
        min(_count_packed(value, format) for format in formats[name]) if name in formats else nbytes(value)
        for name, value in weights.items()
    )


def spend_budget(
    model: Transformer,
    config: AllocationConfig,
    candidates: Candidates,
    fixed: Formats,
    tokens: np.ndarray,
    *,
    batch: int,
    seed: int,
    workbench: Workbench | None = None,
    progress: Progress | None = None,
) -> Allocation:
    """Chooses a format for each layer of the weights that have candidates.

    Args:
      model: with dense weights.
      config: the budget, and how to measure.
      candidates: formats of weights by their names, and how they will be solved.
      fixed: the one format of each weight that is compressed without a choice.
      tokens: int32 (N, T) of calibration, of which `config.windows` are read.
      batch, seed, workbench, progress: as for `measure_sensitivities`.
    Raises:
      InputError: see `check_budget` and `measure_sensitivities`.
    """
    values = {name: param.get_value() for name, param in named_weights(model).items()}
    budget = config.count_bytes(sum(value.size for value in values.values()))
    rest = count_least({name: value for name, value in values.items() if name not in candidates}, fixed)
    if config.trial == "nearest":
        candidates = {name: (formats, NearestConfig()) for name, (formats, _) in candidates.items()}
    windows = tokens[np.arange(config.windows) * len(tokens) // config.windows]
    items = measure_sensitivities(
        model, candidates, windows, batch=batch, seed=seed, workbench=workbench, progress=progress
    )
    best = [min(item.options, key=lambda option: (option.price, option.bytes)) for item in items]
    return Allocation(
        budget=budget,
        least=rest + sum(min(option.bytes for option in item.options) for item in items),
        most=rest + sum(option.bytes for option in best),
        items=tuple(items),
        chosen=tuple(choose([item.options for item in items], budget - rest)),
    )


def _count_packed(value: Weight, format: FormatConfig) -> int:
    shape = jax.ShapeDtypeStruct(value.shape, jnp.float32)
    return nbytes(jax.eval_shape(format.pack, shape))
