"""Count the floating-point operations of a traced function without running it."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


def count_flops(jaxpr: Jaxpr) -> int:
    """Count the operations of a traced function: `jax.make_jaxpr(function)(*arguments).jaxpr`.

    They are 2 a multiplication, of convolutions (zero padding included) and matrix products. A scan
    counts as often as it turns.
    """
    return sum(_own(equation) + _turns(equation) * _inside(equation) for equation in jaxpr.eqns)


def _own(equation: JaxprEqn) -> int:
    name, shapes = equation.primitive.name, [variable.aval.shape for variable in equation.invars]
    outputs = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return 2 * outputs * math.prod(shapes[0][axis] for axis in contracted)
    if name == "conv_general_dilated":
        features = equation.params["dimension_numbers"].rhs_spec[0]
        return (
            2 * outputs * math.prod(size for axis, size in enumerate(shapes[1]) if axis != features)
        )
    return 0


def _turns(equation: JaxprEqn) -> int:
    return equation.params["length"] if equation.primitive.name == "scan" else 1


def _inside(equation: JaxprEqn) -> int:
    """Count what the functions that the equation calls do; of several branches, the dearest.

    Of the forms that a platform may have of its own, the one that all others get is the definition.
    """

    def is_jaxpr(value: Any) -> bool:
        return isinstance(value, (Jaxpr, ClosedJaxpr))

    called = filter(is_jaxpr, jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr))
    inner = [value.jaxpr if isinstance(value, ClosedJaxpr) else value for value in called]
    counts = [count_flops(jaxpr) for jaxpr in inner]
    if equation.primitive.name != "cond":
        return sum(counts)
    platforms = equation.params.get("branches_platforms") or ()
    return counts[platforms.index(None)] if None in platforms else max(counts)
