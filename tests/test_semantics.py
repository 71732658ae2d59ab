"""The formulas of other systems, written as they write them, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import fusedstep as fs
import numpy as np
import pytest
from exact import Array
from fusedstep import _core

TOLERANCE = 1e-14
SIZES = (17, 40)


def close(got: list[Array], expected: list[Array]) -> bool:
    """Agreement relative to the largest element: single elements may cancel."""
    a, b = np.concatenate(got), np.concatenate(expected)
    return bool(np.max(np.abs(a - b)) <= TOLERANCE * np.max(np.abs(b)))


def start(seed: int = 0) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(n) for n in SIZES]


def gradient_of(params: list[Array], t: int) -> list[Array]:
    """Of a quadratic that moves, so that errors feed back."""
    return [0.3 * p + np.sin(np.arange(p.size) + t) for p in params]


# --- braintools >= 0.2 (research: semantics 1.2) ------------------------------------------------


def braintools(
    params: list[Array],
    steps: int,
    *,
    lr: Callable[[int], float],
    mu: float,
    nesterov: bool,
    wd: float,
    cn: float | None,
    cv: float | None,
) -> list[Array]:
    params = [p.copy() for p in params]
    velocity = [np.zeros_like(p) for p in params]
    for t in range(steps):
        grads = gradient_of(params, t)
        if cn is not None:
            norm = math.sqrt(sum(float(np.sum(g * g)) for g in grads))
            if norm >= cn:
                grads = [(g / norm) * cn for g in grads]
        if cv is not None:
            grads = [np.clip(g, -cv, cv) for g in grads]
        grads = [g + wd * p for g, p in zip(grads, params, strict=True)]
        velocity = [g + mu * v for g, v in zip(grads, velocity, strict=True)]
        updates = velocity
        if nesterov:
            updates = [g + mu * v for g, v in zip(grads, velocity, strict=True)]
        params = [p + (-lr(t)) * u for p, u in zip(params, updates, strict=True)]
    return params


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("mu", [0.0, 0.9])
@pytest.mark.parametrize("wd", [0.0, 0.05])
@pytest.mark.parametrize("cn", [None, 2.0, 1e6])
@pytest.mark.parametrize("cv", [None, 0.3])
def test_braintools(
    nesterov: bool, mu: float, wd: float, cn: float | None, cv: float | None
) -> None:
    schedule = fs.ExponentialLR(base_lr=0.1, gamma=0.95)
    expected = braintools(
        start(), 12, lr=schedule.at, mu=mu, nesterov=nesterov, wd=wd, cn=cn, cv=cv
    )
    params = start()
    make = fs.MomentumNesterov if nesterov else fs.Momentum
    opt = make(lr=schedule, momentum=mu, weight_decay=wd, grad_clip_norm=cn, grad_clip_value=cv)
    opt.register_trainable_weights(params)
    for t in range(12):
        opt.step(gradient_of(params, t))
        schedule.step()
    assert close(params, expected)


def test_other_orders_would_be_noticed() -> None:
    """The tolerance separates the order of the design from all others by far."""
    options = {"lr": lambda t: 0.1 / (t + 1), "mu": 0.9, "nesterov": True}
    right = braintools(start(), 12, wd=0.05, cn=2.0, cv=0.3, **options)
    no_value = braintools(start(), 12, wd=0.05, cn=2.0, cv=None, **options)
    no_norm = braintools(start(), 12, wd=0.05, cn=None, cv=0.3, **options)
    assert not close(right, no_value)
    assert not close(right, no_norm)


# --- every one-buffer convention (research: semantics 4.1) --------------------------------------
# A row: v = A v + B g; p = p + C v + D g, from (lr, mu, mu of the next step) at step t.

DAMP = 0.3
ROWS: dict[str, Callable[[float, float, float], tuple[float, float, float, float]]] = {
    "HB out": lambda lr, mu, _: (mu, 1.0, -lr, 0.0),
    "HB out dampened": lambda lr, mu, _: (mu, 1 - DAMP, -lr, 0.0),
    "NAG out": lambda lr, mu, _: (mu, 1.0, -lr * mu, -lr),
    "HB in": lambda lr, mu, _: (mu, -lr, 1.0, 0.0),
    "NAG in": lambda lr, mu, _: (mu, -lr, mu, -lr),
    "HB in, +": lambda lr, mu, _: (mu, lr, -1.0, 0.0),
    "NAG in, +": lambda lr, mu, _: (mu, lr, -mu, -lr),
    "CNTK unit gain": lambda lr, mu, _: (mu, lr * (1 - mu), -1.0, 0.0),
    "CNTK unit gain NAG": lambda lr, mu, _: (mu, lr * (1 - mu), -mu, -lr * (1 - mu)),
    "EMA": lambda lr, mu, _: (mu, 1 - mu, -lr, 0.0),
    "Chainer NesterovAG": lambda lr, mu, _: (mu, -lr, mu**2, -(1 + mu) * lr),
    "NeuPy nesterov": lambda lr, mu, _: (mu**2, -(1 + mu) * lr, 1.0, 0.0),
    "BMUF nesterov": lambda lr, mu, _: (mu, (1 - mu) * lr, -(1 + mu), 0.0),
    "NAG in, mu changing": lambda lr, mu, coming: (mu, -lr, coming, -lr),
}

# The rows that arguments exist for.
FORMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "HB out": (fs.fused_momentum_step, {}),
    "HB out dampened": (fs.fused_momentum_step, {"dampening": DAMP}),
    "NAG out": (fs.fused_nesterov_step, {}),
    "HB in": (fs.fused_momentum_step, {"lr_in_velocity": True}),
    "NAG in": (fs.fused_nesterov_step, {"lr_in_velocity": True}),
    "EMA": (fs.fused_momentum_step, {"dampening": "momentum"}),
    "NAG in, mu changing": (
        fs.fused_nesterov_step,
        {"lr_in_velocity": True, "next_momentum": "coming"},
    ),
}

CONSTANT = [(0.05, 0.9)] * 41
CHANGING = [(0.1 * 0.93**t, 0.5 + 0.4 * t / 41) for t in range(41)]
COURSES = pytest.mark.parametrize("course", [CONSTANT, CHANGING], ids=["constant", "changing"])


def by_formula(row: str, course: list[tuple[float, float]]) -> tuple[list[Array], list[Array]]:
    params, velocity = start(), [np.zeros(n) for n in SIZES]
    for t, (lr, mu) in enumerate(course[:-1]):
        A, B, C, D = ROWS[row](lr, mu, course[t + 1][1])
        for p, v, g in zip(params, velocity, gradient_of(params, t), strict=True):
            v[...] = A * v + B * g
            p[...] = p + C * v + D * g
    return params, velocity


@pytest.mark.usefixtures("isa")
@COURSES
@pytest.mark.parametrize("row", ROWS)
def test_convention_by_coefficients(row: str, course: list[tuple[float, float]]) -> None:
    params, velocity = start(), [np.zeros(n) for n in SIZES]
    index = _core.rules()["momentum"]["index"]
    for t, (lr, mu) in enumerate(course[:-1]):
        A, B, C, D = ROWS[row](lr, mu, course[t + 1][1])
        coefficients = [0.0, A, B, C, D, 1.0, 0.0]
        _core.step_coefficients(index, params, gradient_of(params, t), (velocity,), coefficients)
    expected = by_formula(row, course)
    assert close(params, expected[0])
    assert close(velocity, expected[1])


@pytest.mark.usefixtures("isa")
@COURSES
@pytest.mark.parametrize("row", FORMS)
def test_convention_by_arguments(row: str, course: list[tuple[float, float]]) -> None:
    params, velocity = start(), [np.zeros(n) for n in SIZES]
    function, options = FORMS[row]
    for t, (lr, mu) in enumerate(course[:-1]):
        values = {"momentum": mu, "coming": course[t + 1][1]}
        given = {k: values.get(v, v) if isinstance(v, str) else v for k, v in options.items()}
        function(params, gradient_of(params, t), velocity, lr=lr, momentum=mu, **given)
    expected = by_formula(row, course)
    assert close(params, expected[0])
    assert close(velocity, expected[1])


@pytest.mark.usefixtures("isa")
@COURSES
def test_fista(course: list[tuple[float, float]]) -> None:
    """y stored: two different momenta per step, beta_{k-1} in A and beta_k in N1."""

    def momenta() -> Iterator[tuple[float, float]]:
        t, last = 1.0, 0.0
        while True:
            t_next = (1 + math.sqrt(1 + 4 * t * t)) / 2
            yield last, (t - 1) / t_next
            last, t = (t - 1) / t_next, t_next

    y, velocity = start(), [np.zeros(n) for n in SIZES]
    expected = start()
    x_last = [p.copy() for p in expected]
    index = _core.rules()["momentum"]["index"]
    for k, (before, beta) in zip(range(40), momenta(), strict=False):
        step = course[0][0]
        _core.step_coefficients(
            index, y, gradient_of(y, k), (velocity,), [0.0, before, -step, beta, -step, 1.0, 0.0]
        )
        x = [p - step * g for p, g in zip(expected, gradient_of(expected, k), strict=True)]
        expected = [a + beta * (a - b) for a, b in zip(x, x_last, strict=True)]
        x_last = x
    assert close(y, expected)


# --- decay ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("nesterov", [False, True])
def test_keras3_decoupled_decay(nesterov: bool) -> None:
    """p -= lr*wd*p, then the update, with the lr inside the velocity."""
    params, expected = start(), start()
    velocity = [np.zeros(n) for n in SIZES]
    function = fs.fused_nesterov_step if nesterov else fs.fused_momentum_step
    state: dict[str, Any] = {}
    for t, (lr, mu) in enumerate(CHANGING[:-1]):
        options = {"lr_in_velocity": True, "decoupled_weight_decay": True, "weight_decay": 0.1}
        state = function(
            params, gradient_of(params, t), **state, lr=lr, momentum=mu, **options
        ).state
        for p, v, g in zip(expected, velocity, gradient_of(expected, t), strict=True):
            p -= lr * 0.1 * p
            v[...] = mu * v - lr * g
            p += mu * v - lr * g if nesterov else v
    assert close(params, expected)


def test_decoupled_decay_is_rounded_once() -> None:
    """4e-8 of 1.2 is below half a unit in the last place; as a factor it would round to 6e-8."""
    p = np.full(1, 1.2, np.float32)
    assert np.float32(1 - 4e-8) * p[0] != p[0]
    fs.fused_sgd_step(
        p, np.zeros(1, np.float32), lr=0.1, weight_decay=4e-7, decoupled_weight_decay=True
    )
    assert p[0] == np.float32(1.2)


def test_goyal_conversion_between_conventions() -> None:
    """lr inside with A = mu*lr_t/lr_{t-1} is lr outside, also under a changing lr."""
    outside, inside = start(), start()
    v_out, v_in = ([np.zeros(n) for n in SIZES] for _ in range(2))
    index = _core.rules()["momentum"]["index"]
    last = CHANGING[0][0]
    for t, (lr, _) in enumerate(CHANGING[:-1]):
        fs.fused_nesterov_step(outside, gradient_of(outside, t), v_out, lr=lr, momentum=0.9)
        coefficients = [0.0, 0.9 * lr / last, -lr, 0.9, -lr, 1.0, 0.0]
        _core.step_coefficients(index, inside, gradient_of(inside, t), (v_in,), coefficients)
        last = lr
    assert close(inside, outside)


# --- convergence facts that hold with equality (research: semantics 5) --------------------------


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 50])
def test_gradient_descent_attains_its_worst_case(steps: int) -> None:
    """Huber with slope L R/(2k+1): f(x_k) = L R^2 / (4k + 2), exactly."""
    slope = 1.0 / (2 * steps + 1)
    x = np.ones(1)
    for _ in range(steps):
        fs.fused_sgd_step(x, np.clip(x, -slope, slope), lr=1.0)
    value = slope * abs(x[0]) - slope**2 / 2
    assert math.isclose(value, 1 / (4 * steps + 2), rel_tol=1e-12)


def test_heavy_ball_converges_like_the_root_of_momentum() -> None:
    """On a quadratic the spectral radius is sqrt(mu) wherever the roots are complex."""
    for curvature in (0.2, 1.0, 2.5):
        state: dict[str, Any] = {}
        x, norms = np.ones(1), []
        for _ in range(400):
            state = fs.fused_momentum_step(x, curvature * x, **state, lr=1.0, momentum=0.81).state
            norms.append(math.hypot(x[0], state["velocity"][0]))
        rate = (max(norms[350:400]) / max(norms[50:100])) ** (1 / 300)
        assert math.isclose(rate, 0.9, rel_tol=2e-3)
