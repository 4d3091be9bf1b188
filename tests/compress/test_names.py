"""What formats and layers are called."""

from hsai.compress.names import name_ranges


def test_ranges_are_named() -> None:
    assert name_ranges([0, 1, 2, 3, 7, 9, 10]) == "0-3, 7, 9-10"
    assert name_ranges([4]) == "4" and name_ranges([]) == ""
