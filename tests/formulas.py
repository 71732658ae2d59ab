"""The rules' formulas, each written a second time: one oracle per rule.

First the coefficients from the hyper-parameters, then the formula. A zero coefficient removes its
term.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from exact import Array, fma


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a tensor has come: the 1-based step being taken, and what the state has seen."""

    step: int = 1
    first: bool = False
    product: float = 1.0


def prepare_sgd(h: dict[str, Any], at: Progress) -> list[float]:  # noqa: ARG001
    """Makes wd, S, D."""
    decoupled = h["decoupled_weight_decay"]
    return [
        0.0 if decoupled else h["weight_decay"],
        -h["lr"],
        h["lr"] * h["weight_decay"] if decoupled else 0.0,
    ]


def sgd(k: Sequence[float], p: Array, g: Array) -> tuple[Array]:
    """Updates p <- fma(S, g, fma(-D, p, p)) with g <- fma(wd, p, g)."""
    wd, S, D = k
    g = _add_scaled(wd, p, g)
    return (_add_scaled(S, g, _add_scaled(-D, p, p)),)


def prepare_momentum(h: dict[str, Any], at: Progress) -> list[float]:
    """Makes wd, A, B, N1, N2, S, D."""
    damped = not at.first or h["dampen_first_step"]
    gain = 1.0 - h["dampening"] if damped else 1.0
    B = -h["lr"] * gain if h["lr_in_velocity"] else gain
    decoupled = h["decoupled_weight_decay"]
    return [
        0.0 if decoupled else h["weight_decay"],
        0.0 if at.first else h["momentum"],
        B,
        h["next_momentum"] if h["nesterov"] else 1.0,
        B if h["nesterov"] else 0.0,
        1.0 if h["lr_in_velocity"] else -h["lr"],
        h["lr"] * h["weight_decay"] if decoupled else 0.0,
    ]


def momentum(k: Sequence[float], p: Array, g: Array, v: Array) -> tuple[Array, Array]:
    """Updates v <- fma(B, g, A*v); d <- fma(N1, v, N2*g); p <- fma(S, d, fma(-D, p, p))."""
    wd, A, B, N1, N2, S, D = k
    g = _add_scaled(wd, p, g)
    v = _combine(B, g, A, v)
    d = _combine(N1, v, N2, g)
    return _add_scaled(S, d, _add_scaled(-D, p, p)), v


def _add_scaled(a: float, x: Array, y: Array) -> Array:
    return fma(a, x, y, y.dtype) if a != 0 else y


def _combine(a: float, x: Array, b: float, y: Array) -> Array:
    """a*x + b*y: b*y is rounded, then one fused multiply-add."""
    with np.errstate(all="ignore"):
        rounded = x.dtype.type(b) * y if b != 0 else np.zeros_like(y)
        if b != 0:
            return fma(a, x, rounded, x.dtype) if a != 0 else rounded
        return x.dtype.type(a) * x if a != 0 else rounded


def power(base: float, n: int) -> float:
    """base**n by repeated squaring."""
    result = 1.0
    while n > 0:
        if n & 1:
            result *= base
        base, n = base * base, n >> 1
    return result


def exp_of_negative(x: float) -> float:
    """e**x for x <= 0, from + * / alone: 2**-n times the Taylor series of the rest."""
    if not x > -746.0:
        return 0.0
    n = math.floor(0.5 - x * float.fromhex("0x1.71547652b82fep+0"))
    r = (x + n * float.fromhex("0x1.62e42feep-1")) + n * float.fromhex("0x1.a39ef35793c76p-33")
    total = 1.0
    for k in range(14, 0, -1):
        total = 1.0 + total * r / k
    return total * power(0.5, n)


def one_minus_power(base: float, n: int) -> float:
    """1 - base**n by repeated squaring, from 1 - b**2 = (1 - b)(1 + b)."""
    result, done, rest = 0.0, 1.0, 1.0 - base
    while n > 0:
        if n & 1:
            result += done * rest
            done *= base
        n, rest = n >> 1, rest * (1.0 + base)
        base *= base
    return result


def average_weights(beta: float) -> list[float]:
    """The smaller of the two weights, at its place: of what comes in, of what was there."""
    return [1.0 - beta, 0.0] if beta >= 0.5 else [0.0, beta]


def average(c: float, b: float, x: Array, m: Array) -> Array:
    """An exponential moving average, from the end that is nearer."""
    with np.errstate(all="ignore"):
        if c != 0:
            return fma(c, x - m, m, m.dtype)
        return fma(b, m - x, x, m.dtype) if b != 0 else x


def prepare_adam(h: dict[str, Any], at: Progress) -> list[float]:
    """Makes wd, c1, b1, c2, b2, R, S, eps, D."""
    decoupled = h["decoupled_weight_decay"]
    return [
        0.0 if decoupled else h["weight_decay"],
        *average_weights(h["beta1"]),
        *average_weights(h["beta2"]),
        1.0 / math.sqrt(one_minus_power(h["beta2"], at.step)),
        -h["lr"] / one_minus_power(h["beta1"], at.step),
        h["eps"],
        h["lr"] * h["weight_decay"] if decoupled else 0.0,
    ]


def adam(k: Sequence[float], p: Array, g: Array, m: Array, s: Array) -> tuple[Array, ...]:
    """Updates m, s <- averages of g, g*g; p <- fma(S, m / fma(R, sqrt(s), eps), fma(-D, p, p))."""
    m, s = _moments(k[:5], p, g, m, s)
    return _adam_descent(k, p, m, s), m, s


def adam_amsgrad(
    k: Sequence[float], p: Array, g: Array, m: Array, s: Array, x: Array
) -> tuple[Array, ...]:
    """Updates as `adam`, with x <- max(x, s) in place of s in the last line."""
    m, s = _moments(k[:5], p, g, m, s)
    x = np.where(x > s, x, s)
    return _adam_descent(k, p, m, x), m, s, x


def _moments(k: Sequence[float], p: Array, g: Array, m: Array, s: Array) -> tuple[Array, Array]:
    wd, c1, b1, c2, b2 = k
    g = _add_scaled(wd, p, g)
    with np.errstate(all="ignore"):
        return average(c1, b1, g, m), average(c2, b2, g * g, s)


def _adam_descent(k: Sequence[float], p: Array, m: Array, s: Array) -> Array:
    R, S, eps, D = k[5:]
    with np.errstate(all="ignore"):
        return _add_scaled(S, m / fma(R, np.sqrt(s), eps, p.dtype), _add_scaled(-D, p, p))


def mu_of_nadam(h: dict[str, Any], t: int, beta: str = "beta1") -> float:
    """beta1 (1 - 0.96**(t psi) / 2)."""
    log_of_0_96 = float.fromhex("-0x1.4e69ed6d80eb3p-5")
    return h[beta] * (1.0 - 0.5 * exp_of_negative(t * h["momentum_decay"] * log_of_0_96))


def prepare_nadam(h: dict[str, Any], at: Progress) -> list[float]:
    """Makes wd, c1, b1, c2, b2, G, M, R, S, eps, D."""
    mu, next_mu = mu_of_nadam(h, at.step), mu_of_nadam(h, at.step + 1, "next_beta1")
    product = at.product * mu
    decoupled = h["decoupled_weight_decay"]
    return [
        0.0 if decoupled else h["weight_decay"],
        *average_weights(h["beta1"]),
        *average_weights(h["beta2"]),
        (1.0 - mu) / (1.0 - product),
        next_mu / (1.0 - product * next_mu),
        1.0 / math.sqrt(one_minus_power(h["beta2"], at.step)),
        -h["lr"],
        h["eps"],
        h["lr"] * h["weight_decay"] if decoupled else 0.0,
    ]


def nadam(k: Sequence[float], p: Array, g: Array, m: Array, s: Array) -> tuple[Array, ...]:
    """Updates m, s as `adam`; p <- fma(S, fma(M, m, G*g) / fma(R, sqrt(s), eps), fma(-D, p, p))."""
    G, M, R, S, eps, D = k[5:]
    m, s = _moments(k[:5], p, g, m, s)
    g = _add_scaled(k[0], p, g)
    with np.errstate(all="ignore"):
        ratio = _combine(M, m, G, g) / fma(R, np.sqrt(s), eps, p.dtype)
        return _add_scaled(S, ratio, _add_scaled(-D, p, p)), m, s


def prepare_rmsprop(h: dict[str, Any], at: Progress) -> list[float]:  # noqa: ARG001
    """Makes wd, c, b, A, N1, N2, S, eps, D, E."""
    decoupled = h["decoupled_weight_decay"]
    return [
        0.0 if decoupled else h["weight_decay"],
        *average_weights(h["alpha"]),
        h["momentum"],
        h["next_momentum"] if h["nesterov"] else 1.0,
        1.0 if h["nesterov"] else 0.0,
        -h["lr"],
        0.0 if h["eps_in_root"] else h["eps"],
        h["lr"] * h["weight_decay"] if decoupled else 0.0,
        h["eps"] if h["eps_in_root"] else 0.0,
    ]


def rmsprop(
    k: Sequence[float],
    p: Array,
    g: Array,
    s: Array,
    a: Array | None = None,
    v: Array | None = None,
) -> tuple[Array, ...]:
    """Updates s, a <- averages of g*g, g; u = g / (sqrt(s - a*a + E) + eps); v <- fma(A, v, u).

    The step is fma(N1, v, N2*u) along v. What a rule does not keep is None, and drops out.
    """
    wd, c, b, A, N1, N2, S, eps, D, E = k
    g = _add_scaled(wd, p, g)
    with np.errstate(all="ignore"):
        s = variance = average(c, b, g * g, s)
        if a is not None:
            a = average(c, b, g, a)
            variance = fma(-a, a, s, s.dtype)
            variance = np.where(variance < 0, s.dtype.type(0), variance)
        if E != 0:
            variance = variance + s.dtype.type(E)
        u = g / (np.sqrt(variance) + s.dtype.type(eps))
    if v is not None:
        v = _add_scaled(A, v, u)
        u = _combine(N1, v, N2, u)
    p = _add_scaled(S, u, _add_scaled(-D, p, p))
    return tuple(x for x in (p, s, a, v) if x is not None)


def rmsprop_momentum(
    k: Sequence[float], p: Array, g: Array, s: Array, v: Array
) -> tuple[Array, ...]:
    """`rmsprop` without a."""
    return rmsprop(k, p, g, s, None, v)


def prepare_accumulate(h: dict[str, Any], at: Progress) -> list[float]:  # noqa: ARG001
    """Makes A, B."""
    return [h["keep"], h["scale"]]


def accumulate(k: Sequence[float], p: Array, g: Array) -> tuple[Array]:
    """Updates p <- fma(B, g, A*p)."""
    return (_combine(k[1], g, k[0], p),)
