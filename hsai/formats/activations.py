"""Has products with packed weights round activations: a choice of whoever runs a model, not of whoever trains it."""

from typing import Any, TypeVar

from hsai.errors import InputError
from hsai.formats.outliers import Outliers
from hsai.formats.packed import Weight
from hsai.formats.rounded import INTEGERS, Activations, Rounded
from hsai.formats.runs import Runs
from hsai.formats.storage import named_weights, replace_weights

M = TypeVar("M")
MOST_DIMENSIONS = 3
"""Layers, contraction, outputs: experts have one more, and are multiplied by as dense weights."""


def take_activations(model: M, activations: Activations) -> M:
    """The model, with products that take activations like this.

    "float" leaves it as it is: a bundle that was exported with rounded activations keeps them. "int8" rounds where
    weights are of integers (`hsai.formats.rounded`): whatever is dense, floating or of experts takes them as before.

    Raises:
      InputError: int8, and there is no such weight.
    """
    if activations == "float":
        return model
    held = {name: param.get_value() for name, param in named_weights(model).items()}
    rounded = replace_weights(
        model, {name: _round(value) for name, value in held.items() if value.ndim <= MOST_DIMENSIONS}
    )
    if find_activations(rounded) == "float":
        raise InputError("activations=int8 is for products with weights of integers, and this model has none")
    return rounded


def find_activations(model: Any) -> Activations:
    """How products of a model take activations: "int8" if that is how any of them does."""
    rounds = any(_takes_integers(param.get_value()) for param in named_weights(model).values())
    return "int8" if rounds else "float"


def _takes_integers(value: Weight) -> bool:
    """Whether products with a weight, or with a part of it, round activations."""
    match value:
        case Rounded():
            return True
        case Runs(parts):
            return any(map(_takes_integers, parts))
        case Outliers(base):
            return isinstance(base, Rounded)
        case _:
            return False


def _round(value: Weight) -> Weight:
    """The weight, rounding what it is multiplied by where it is of integers."""
    match value:
        case Runs(parts):
            return Runs(tuple(map(_round, parts)))
        case Outliers(base, rows, index) if isinstance(base, INTEGERS):
            return Outliers(Rounded(base), rows, index)
        case _ if isinstance(value, INTEGERS):
            return Rounded(value)
        case _:
            return value
