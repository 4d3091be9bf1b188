"""A small random checkpoint of each family, made by `transformers`, and what it computes."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.interop.checkpoints import FAMILIES, make_checkpoint


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A checkpoint, and the logits of its model for `tokens`, computed by torch in float32."""

    directory: Path
    tokens: np.ndarray
    logits: np.ndarray


GetForeign = Callable[[str], Foreign]


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> GetForeign:
    """By the name of a family; each is made once, and not to be changed."""

    @functools.cache
    def get(name: str) -> Foreign:
        directory = tmp_path_factory.mktemp("foreign") / name
        model = make_checkpoint(name, directory)
        tokens = np.random.default_rng(1).integers(0, FAMILIES[name].vocab, (2, 20), np.int32)
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
        return Foreign(directory, tokens, logits)

    return get
