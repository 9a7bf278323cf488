"""Walk through the operations of a traced program, those of its inner programs included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax


def equations(jaxpr: Any) -> Iterator[Any]:
    """Yield them in their order: `jax.make_jaxpr(function)(*arguments).jaxpr`."""
    for equation in jaxpr.eqns:
        yield equation
        inner = jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda value: hasattr(value, "jaxpr") or hasattr(value, "eqns"),
        )
        for value in inner:
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "eqns"):
                yield from equations(value)


def precisions(jaxpr: Any, primitive: str) -> list[Any]:
    """Return the precision of each operation of this name, of both operands, or None."""
    found = [one for one in equations(jaxpr) if one.primitive.name == primitive]
    return [one.params["precision"] for one in found]
