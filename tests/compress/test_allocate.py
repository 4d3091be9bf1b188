"""The allocation against all that could have been chosen, on random and on awkward candidates."""

import itertools

import numpy as np
import pytest

from hsai.compress.allocate import AllocationConfig, Option, choose
from hsai.errors import InputError
from hsai.formats import Int8Config


def make_items(*pairs: list[tuple[int, float | None]]) -> list[list[Option]]:
    return [[Option(format=Int8Config(), bytes=size, loss=loss) for size, loss in item] for item in pairs]


def total(items: list[list[Option]], chosen: list[int]) -> tuple[int, float]:
    options = [item[index] for item, index in zip(items, chosen, strict=True)]
    return sum(option.bytes for option in options), sum(option.price for option in options)


def search(items: list[list[Option]], budget: int) -> float:
    """The least loss of all choices within the budget."""
    every = itertools.product(*(range(len(item)) for item in items))
    return min(loss for size, loss in (total(items, list(choice)) for choice in every) if size <= budget)


def draw_items(seed: int) -> list[list[Option]]:
    """Falling losses mostly; some candidates are larger and worse, some as large as others, some as good."""
    draw = np.random.default_rng(seed)
    items = []
    for _ in range(draw.integers(1, 7)):
        count = draw.integers(1, 5)
        sizes = draw.integers(10, 200, count)
        losses = draw.lognormal(0, 1) * np.exp(-sizes / 40) * draw.lognormal(0, 0.5, count)
        if draw.random() < 0.3:
            losses = np.round(losses, 1)
        items.append(list(zip(sizes.tolist(), losses.tolist(), strict=True)))
    return make_items(*items)


@pytest.mark.parametrize("seed", range(60))
def test_it_is_the_best_choice(seed: int) -> None:
    items = draw_items(seed)
    sizes = [sorted(option.bytes for option in item) for item in items]
    least, most = sum(size[0] for size in sizes), sum(size[-1] for size in sizes)
    for budget in np.unique(np.linspace(least, most + 5, 12).astype(int)).tolist():
        size, loss = total(items, choose(items, budget))
        assert size <= budget and loss == pytest.approx(search(items, budget), abs=1e-12)
    # And with everything it could want it has the least losses that there are.
    assert total(items, choose(items, most))[1] == pytest.approx(sum(min(o.price for o in item) for item in items))


@pytest.mark.parametrize("seed", range(20))
def test_a_budget_of_more_units_is_that_of_a_little_less(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes of no common divisor, counted in 32nds of the budget; a single option that just fits is still taken."""
    items = draw_items(seed)
    least, most = (sum(f(o.bytes for o in item) for item in items) for f in (min, max))
    budget = (least + most) // 2
    monkeypatch.setattr("hsai.compress.allocate.UNITS", 32)
    size, loss = total(items, choose(items, budget))
    rounded = budget - len(items) * -(-(budget - least) // 32)
    assert size <= budget and loss <= search(items, max(rounded, least)) + 1e-12
    (item,) = make_items([(1000, 2.0), (1997, 1.0)])
    assert [choose([item], room) for room in (1996, 1997)] == [[0], [1]]


def test_hundreds_of_items_are_spent_at_best() -> None:
    """Where the last step of the relaxation just fits, that is the solution (Sinha and Zoltners, 1979)."""
    draw = np.random.default_rng(0)
    items = make_items(
        *([(size, weight * 2.0 ** (-size / 10)) for size in (20, 30, 40, 80)] for weight in draw.lognormal(0, 2, 300))
    )
    steps = sorted(
        ((a.price - b.price) / (b.bytes - a.bytes), a.price - b.price, b.bytes - a.bytes)
        for item in items
        for a, b in itertools.pairwise(item)
    )[::-1]
    size, loss = sum(item[0].bytes for item in items), sum(item[0].price for item in items)
    for _, saved, more in steps[:450]:
        size, loss = size + more, loss - saved
    found = total(items, choose(items, size))
    assert found[0] == size and found[1] == pytest.approx(loss, rel=1e-9)


def test_one_format_for_all_is_found_where_nothing_is_better() -> None:
    """A large item whose step fits no rest of the budget: by prices alone it would be bought, and others pay for it."""
    small = [(10, 1.0), (20, 0.01)]
    items = make_items([(1000, 0.8), (2000, 0.0)], *([small] * 100))
    assert choose(items, 3000) == [0] + [1] * 100
    assert choose(items, 4000) == [1] * 101


def test_losses_that_are_no_numbers_are_the_worst() -> None:
    items = make_items([(10, None), (20, 1.0), (30, None)], [(10, None)])
    assert choose(items, 100) == [1, 0] and choose(items, 29) == [0, 0]


def test_an_item_without_any_price_leaves_the_others_at_their_best() -> None:
    """The dearest step would be bought first, were not all of them looked at together; as few as can be stay unknown,
    whatever that costs."""
    items = make_items([(10, None), (20, None)], [(1000, 5.0), (2000, 0.0)], *([[(10, 1.0), (20, 0.01)]] * 100))
    assert choose(items, 10 + 3000) == [0, 0] + [1] * 100
    items = make_items([(10, None), (20, 1e30)], [(10, 1.0), (20, 0.0)])
    assert choose(items, 30) == [1, 0] and choose(items, 40) == [1, 1]


def test_what_lies_above_the_line_of_others_is_taken_where_it_fits() -> None:
    (item,) = make_items([(10, 10.0), (30, 6.0), (50, 1.0)])
    assert [choose([item], budget) for budget in (10, 29, 30, 49, 50)] == [[0], [0], [1], [1], [2]]


def test_the_sensitive_layer_gets_the_bytes() -> None:
    items = make_items([(10, 1.0), (20, 0.1)], [(10, 50.0), (20, 5.0)], [(10, 2.0), (20, 0.2)])
    assert choose(items, 40) == [0, 1, 0] and choose(items, 50) == [0, 1, 1] and choose(items, 49) == [0, 1, 0]


def test_larger_and_worse_is_never_chosen() -> None:
    items = make_items([(10, 1.0), (20, 2.0), (20, 0.5), (30, 0.5)])
    assert choose(items, 1000) == [2]


def test_a_budget_below_the_least_is_refused_with_numbers() -> None:
    items = make_items([(1000, 1.0), (2000, 0.1)], [(1500, 1.0)])
    with pytest.raises(InputError, match=r"a budget of 2,499 bytes cannot be met: .* the model has 2,500 bytes"):
        choose(items, 2499)
    assert choose(items, 2500) == [0, 0]


def test_configs_that_say_no_budget_are_refused() -> None:
    assert AllocationConfig(bits_per_weight=2.5).count_bytes(1000) == 312
    assert AllocationConfig(bytes=77).count_bytes(1000) == 77
    for fields, message in [
        ({}, "give one of them"),
        ({"bytes": 10, "bits_per_weight": 2.0}, "give one of them"),
        ({"bytes": 0}, "allocation.bytes=0 must be at least 1"),
        ({"bits_per_weight": 0.0}, "allocation.bits_per_weight=0 must be above 0 and at most 32"),
        ({"bits_per_weight": float("nan")}, "allocation.bits_per_weight=nan"),
        ({"bytes": 10, "windows": 0}, "allocation.windows=0 must be at least 1"),
    ]:
        with pytest.raises(InputError, match=message):
            AllocationConfig(**fields)
