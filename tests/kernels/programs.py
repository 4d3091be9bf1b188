"""Looks into a traced program, whatever is nested in it: loops, functions, kernels."""

from collections.abc import Iterator
from typing import Any

import jax


def find_equations(jaxpr: Any, primitive: str) -> Iterator[Any]:
    """All equations of one primitive, those in functions and kernels that the program calls too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == primitive:
            yield equation
        for inner in jax.tree.leaves(
            equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")
        ):
            if hasattr(inner, "jaxpr"):
                yield from find_equations(inner.jaxpr, primitive)
            elif hasattr(inner, "eqns"):
                yield from find_equations(inner, primitive)
