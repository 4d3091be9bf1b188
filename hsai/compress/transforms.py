"""What happens to a model before any weight of it is compressed: other weights, and the same function.

A quantizer is no friend of outliers. A transform moves them where they do less harm, and leaves formats, solvers and
everything behind them as they are: each is params -> params.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from hsai.compress.calibration import CalibrationConfig
from hsai.compress.ledger import ScaleRow
from hsai.compress.resume import Workbench
from hsai.compress.rotation import RotationConfig, rotate_model
from hsai.compress.scaling import ScalingConfig, apply_scales, find_scales
from hsai.compress.stream import Progress
from hsai.errors import InputError
from hsai.formats import FormatConfig, Packed
from hsai.formats.storage import named_weights, replace_weights
from hsai.models import Transformer
from hsai.models.transformer import abstract_transformer

M = TypeVar("M")
TransformConfig = RotationConfig | ScalingConfig


def check_order(transforms: Sequence[TransformConfig]) -> None:
    """Raises `InputError` for a transform that stands there twice, or that the next one would undo."""
    kinds = [transform.kind for transform in transforms]
    if len(set(kinds)) < len(kinds):
        raise InputError(f"transforms ({', '.join(kinds)}) name one kind twice")
    if kinds == ["scaling", "rotation"]:
        raise InputError("transforms: a rotation moves the gains that scaling has set; let it come first")


def outline(transforms: Sequence[TransformConfig], model: Any) -> Any:
    """The model that the transforms will give; a weight that they add is a shape.

    Raises:
      InputError: a transform cannot be of this model, or a weight is packed.
    """
    if not transforms:
        return model
    assert isinstance(model, Transformer)
    for name, param in named_weights(model).items():
        if isinstance(param.get_value(), Packed):
            raise InputError(
                f"{name} is packed already, and transforms are of dense weights; take the dense checkpoint"
            )
    config = model.config
    for transform in transforms:
        if isinstance(transform, RotationConfig):
            config = transform.plan(config)
    if config == model.config:
        return model
    return replace_weights(
        abstract_transformer(config), {name: param.get_value() for name, param in named_weights(model).items()}
    )


def transform_model(
    model: M,
    transforms: Sequence[TransformConfig],
    formats: Mapping[str, Sequence[FormatConfig]],
    *,
    calibration: CalibrationConfig | None,
    tokens: np.ndarray | None,
    workbench: Workbench | None = None,
    progress: Progress | None = None,
) -> tuple[M, tuple[ScaleRow, ...]]:
    """The model with all transforms, and what the search for scales found.

    Args:
      model: a `Transformer` with dense weights, where there are transforms.
      transforms: in their order.
      formats: what weights may become, by their names in `outline`.
      calibration: how `tokens`, int32 (N, T), are read; both for transforms that calibrate.
      workbench, progress: as for `find_scales`.
    Raises:
      InputError: see `rotate_model` and `find_scales`.
    """
    rows: tuple[ScaleRow, ...] = ()
    changed: Any = model
    for transform in transforms:
        if isinstance(transform, RotationConfig):
            changed = rotate_model(changed, transform)
            continue
        if calibration is None or tokens is None:
            raise ValueError("scaling calibrates; it needs the calibration's tokens")
        batch = calibration.batch
        scales = find_scales(changed, transform, formats, tokens, batch=batch, workbench=workbench, progress=progress)
        changed, rows = apply_scales(changed, scales.factors), scales.rows
    return changed, rows
