"""Text that recipes are calibrated on, and that their outputs are measured on: whose it is, and in which batches."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from hsai.cli.corpora import open_own_corpus
from hsai.compress import Plan, RecipeConfig
from hsai.compress.calibration import CalibrationConfig, draw_windows
from hsai.errors import InputError
from hsai.evaluate.perplexity import read_text
from hsai.export.source import ModelSource
from hsai.progress import say


def check_batches(recipes: dict[str, RecipeConfig], mesh: Mesh) -> None:
    """Raises `InputError` for a recipe whose windows a mesh does not split evenly. A batch is widened to what devices
    share evenly, so that only whole numbers of such batches will do."""
    data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
    parts = data * fsdp
    split = f"the {parts} devices that --mesh splits a batch over (data={data} x fsdp={fsdp})"
    for name, recipe in recipes.items():
        if recipe.calibration is None:
            continue
        batch, length = math.lcm(recipe.calibration.batch, parts), recipe.calibration.sequence_length
        windows = recipe.calibration.tokens // length
        why = f"batches of {batch}, which calibration.batch={recipe.calibration.batch} takes on {split}"
        if windows % batch:
            raise InputError(
                f"recipe {name}: the {windows} windows of calibration.tokens={recipe.calibration.tokens} are no whole "
                f"{why}; let calibration.tokens be a multiple of {batch * length}"
            )
        if recipe.allocation is not None and recipe.allocation.windows % batch:
            raise InputError(
                f"recipe {name}: allocation.windows={recipe.allocation.windows} are no whole {why}; let it be a "
                f"multiple of {batch}"
            )


def read_windows(
    recipes: dict[str, RecipeConfig], plans: dict[str, Plan], source: ModelSource, text: Path | None
) -> dict[str, np.ndarray]:
    """The tokens that each recipe is calibrated on, int32 (N, T) by its name; and of others those that their output
    errors are measured on, where a text is given. What is in the format of a recipe already needs none.

    Raises:
      InputError: the text is needed, and is not there, too short, or no UTF-8; windows exceed the model's context.
    """
    asking: dict[str, CalibrationConfig | None] = {}
    for name, recipe in recipes.items():
        if plans[name].reads_text or (text is not None and plans[name].measured):
            asking[name] = recipe.calibration
        elif text is not None and not plans[name].multiplied:
            say(f"note: recipe {name}: nothing is multiplied by what it packs; there are no outputs to measure")
        elif text is not None or recipe.calibration is not None:
            say(f"note: recipe {name}: all that it would solve is in its format already; no calibration is read")
    if not asking:
        return {}
    stream = _read_stream(source, text)
    windows = {}
    for name, asked in asking.items():
        config = asked or choose_measured(source, stream)
        if config is None:
            say(f"note: recipe {name}: a text of {len(stream)} tokens is too short to measure output errors on")
            continue
        if config.sequence_length > source.config.max_length:
            raise InputError(
                f"recipe {name}: calibration.sequence_length={config.sequence_length} exceeds the model's context of "
                f"{source.config.max_length}"
            )
        try:
            windows[name] = draw_windows(stream, config)
        except InputError as error:
            raise InputError(f"recipe {name}: {error}") from error
    return windows


def choose_measured(source: ModelSource, stream: np.ndarray) -> CalibrationConfig | None:
    """How much text measures what does not calibrate: as much as calibrates by default or, of less, all there is, in
    windows that the model can read; None of what has not one."""
    default = CalibrationConfig()
    length = min(default.sequence_length, source.config.max_length)
    windows = min(default.tokens // default.sequence_length, len(stream) // length)
    if windows == 0:
        return None
    batch = math.gcd(windows, default.batch)
    return replace(default, tokens=windows * length, sequence_length=length, batch=batch)


def _read_stream(source: ModelSource, text: Path | None) -> np.ndarray:
    """Token ids of the text, or of the training text of the model's corpus."""
    if text is not None:
        try:
            return np.asarray(source.tokenizer.encode(read_text(text)), np.int32)
        except InputError as error:
            raise InputError(f"--calibration: {error}") from error
    return open_own_corpus(source, None, "--calibration").train
