"""A cache in pages: the same hidden states as without one, whatever pages rows have, and nothing is copied."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai.models import CacheFormat, Transformer
from hsai.models.paged import LayerPages, PagedCache
from tests.models.conftest import MakeModel
from tests.models.test_cache import BOUNDS

Draw = np.random.default_rng
PAGE = 4


@functools.partial(jax.jit, donate_argnums=3)
def read(
    model: Transformer, tokens: jax.Array, positions: jax.Array, cache: PagedCache
) -> tuple[jax.Array, PagedCache | None]:
    return model(tokens, positions=positions, cache=cache)


@jax.jit
def read_whole(model: Transformer, tokens: jax.Array) -> jax.Array:
    return model(tokens)[0]


CASES: list[tuple[dict[str, Any], CacheFormat]] = [
    ({}, "activations"),
    ({"sliding_window": 5, "qk_norm": True}, "activations"),
    ({"sliding_window": 4, "global_every": 2}, "activations"),
    *(({}, format) for format in BOUNDS),
]


@pytest.mark.parametrize(("changes", "format"), CASES, ids=str)
def test_pieces_through_pages_are_the_whole(
    make_model: MakeModel, changes: dict[str, Any], format: CacheFormat
) -> None:
    """Two rows whose pages lie in no order, the second some tokens behind the first, with the same first page."""
    model, rows = make_model(**changes), Draw(0).integers(0, 60, (2, 13), np.int32)
    rows[1, :PAGE] = rows[0, :PAGE]
    cache: PagedCache | None = PagedCache(
        model.make_cache(9, PAGE, format), jnp.array([[5, 2, 7, 0], [5, 6, 1, 3]], jnp.int32)
    )
    # How many tokens of each row are read together; the second's first ones the first row has written.
    steps = [(PAGE, 0), (3, 5), (1, 1), (5, 2), (0, 1)]
    done, found = [0, PAGE], np.zeros((2, 13, model.config.embed), np.float32)
    for counts in steps:
        tokens, positions = np.zeros((2, 5), np.int32), np.full((2, 5), -1, np.int32)
        for row, count in enumerate(counts):
            tokens[row, :count] = rows[row, done[row] : done[row] + count]
            positions[row, :count] = np.arange(done[row], done[row] + count)
            done[row] += count
        assert cache is not None
        hidden, cache = read(model, tokens, positions, cache)
        for row in range(2):
            there = positions[row] >= 0
            found[row, positions[row][there]] = hidden[row][there]
    found[1, :PAGE] = found[0, :PAGE]
    assert done == [13, 13]
    assert np.abs(found - read_whole(model, rows)).max() < (2e-5 if format == "activations" else BOUNDS[format])


def test_tokens_that_are_nobodys_are_written_nowhere() -> None:
    stored = (jnp.zeros((2, 3, PAGE, 1, 2)), jnp.zeros((2, 3, PAGE, 1, 2)), None, None)
    view = LayerPages(stored, jnp.int32(1), jnp.array([[2, 3, -1], [0, 1, 1]], jnp.int32))
    new = jnp.ones((2, 4, 1, 2))
    # In a page, in one that does not exist, at a negative entry, beyond the table; nobody's; twice in pages.
    after = view.write(new, 2 * new, jnp.array([[3, 4, 9, 12], [-1, 0, 7, -5]], jnp.int32))
    written = np.argwhere(np.asarray(after.stored[0])[..., 0, 0]).tolist()
    assert written == [[1, 0, 0], [1, 1, 3], [1, 2, 3]]
    assert np.array_equal(2 * after.stored[0], after.stored[1])


@pytest.mark.parametrize("format", ["activations", "bfloat16", "int8", "int4"])
def test_no_step_copies_or_widens_the_pages(make_model: MakeModel, format: CacheFormat) -> None:
    """All layers' pages lie in one array, which is written in place and read where it lies."""
    model = make_model()
    pages = model.make_cache(512, PAGE, format)
    cache = PagedCache(pages, jnp.zeros((2, 8), jnp.int32))
    one = jnp.zeros((2, 1), jnp.int32)
    text = read.lower(model, one, one, cache).compile().as_text()
    shape = ",".join(map(str, pages.keys.shape))
    lines = [line.strip() for line in text.splitlines() if f"[{shape}]" in line]
    assert lines and not [line for line in lines if " copy(" in line]
    if format != "activations":
        assert f"f32[{shape}]" not in text.replace(f"bf16[{shape}]", "")
