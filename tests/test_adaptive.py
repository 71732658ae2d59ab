"""The adaptive rules against their printed formulas in float64; the limits of float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fusedstep as fs
import numpy as np
import papers
import pytest
from exact import Array, mismatch

STEPS, SIZE = 100, 257
EVERY_FORM = pytest.mark.parametrize(
    ("kind", "case"), papers.PAIRS, ids=[f"{k.__name__}-{c}" for k, c in papers.PAIRS]
)
CLASSES = pytest.mark.parametrize("kind", list(papers.FORMULAS), ids=lambda k: k.__name__)


def course(dtype: Any, seed: int = 0) -> Iterator[Array]:
    """Gradients of changing size, none of them zero."""
    rng = np.random.default_rng(seed)
    for _ in range(STEPS):
        g = rng.standard_normal(SIZE) * rng.uniform(0.1, 2)
        yield np.where(np.abs(g) < 1e-3, 1e-3, g).astype(dtype)


def start(dtype: Any) -> Array:
    """Parameters from large to very small ones."""
    rng = np.random.default_rng(7)
    return (rng.standard_normal(SIZE) * 10 ** rng.uniform(-6, 1, SIZE)).astype(dtype)


def far(got: Array, expected: Array, tolerance: float) -> bool:
    """Relative to the largest element: single ones may cancel."""
    return not np.max(np.abs(got - expected)) <= tolerance * np.max(np.abs(expected))


# --- the printed formulas ---------------------------------------------------------------------


@pytest.mark.usefixtures("isa")
@EVERY_FORM
def test_float64_follows_the_printed_formula(kind: type[fs.Optimizer], case: str) -> None:
    """Parameters and state over 100 steps, by the object and by the function."""
    given = papers.CASES[kind][case]
    h, formula = papers.hypers(kind, **given), papers.FORMULAS[kind]
    expected, theirs = start(np.float64), {}
    p, q, state = start(np.float64), start(np.float64), {}
    opt = kind([p], **given)
    for t, g in enumerate(course(np.float64), 1):
        expected = formula(h, t, expected, g, theirs)
        opt.step([g])
        state = papers.FUNCTIONS[kind](q, g, **state, **{"lr": h["lr"], **given}).state
    assert not mismatch(p, q)
    assert not far(p, expected, 1e-12)
    entry = opt.state_dict()["state"][0]
    assert entry.pop("step") == STEPS
    assert set(entry) == set(theirs)
    for name, buffer in theirs.items():
        assert not far(entry[name], buffer, 1e-12), name


@EVERY_FORM
def test_the_tolerance_sees_every_option(kind: type[fs.Optimizer], case: str) -> None:
    """Each form but the plain one is far from the plain one, so none of them could be ignored."""
    given, formula = papers.CASES[kind][case], papers.FORMULAS[kind]
    results = []
    for h in (papers.hypers(kind), papers.hypers(kind, **given)):
        p, state = start(np.float64), {}
        for t, g in enumerate(course(np.float64), 1):
            p = formula(h, t, p, g, state)
        results.append(p)
    assert far(*results, 1e-8) == bool(given)


@pytest.mark.usefixtures("isa")
@EVERY_FORM
def test_float32_step_from_a_stored_state(kind: type[fs.Optimizer], case: str) -> None:
    """One float32 step against the float64 formula on the same numbers, a hundred times.

    The terms of an update may cancel (in 2 of 100,000 elements here): there, one unit in the
    last place of the largest update stands for 2e-6 of their sum.
    """
    given = papers.CASES[kind][case]
    h, formula = papers.hypers(kind, **given), papers.FORMULAS[kind]
    p, state = start(np.float32), {}
    for t, g in enumerate(course(np.float32), 1):
        before = p.astype(np.float64)
        wide = {k: np.float64(v) for k, v in state.items() if k != "step"}
        exact = formula(h, t, before, g.astype(np.float64), wide)
        state = papers.FUNCTIONS[kind](p, g, **state, **{"lr": h["lr"], **given}).state
        ulp = np.spacing(np.maximum(np.abs(before), np.abs(exact)).astype(np.float32))
        update = np.abs(exact - before)
        bound = ulp + np.maximum(2e-6 * update, 2.0**-23 * np.max(update))
        excess = np.abs(p - exact) - bound
        assert np.max(excess) <= 0, f"step {t}, [{np.argmax(excess)}]"


# --- averages ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("beta", [0.2, 0.9, 0.99, 0.999, 0.99999, 0.9999999])
def test_a_constant_gradient_is_a_fixed_point_of_its_averages(beta: float) -> None:
    """The weights add up to 1, whatever the betas are rounded to: no bit moves."""
    g = np.random.default_rng(0).uniform(-3, 3, 10_000).astype(np.float32)
    m, s = g.copy(), g * g
    fs.fused_adam_step(np.zeros_like(g), g, m, s, step=10**6, lr=0.1, betas=(beta, beta))
    assert not mismatch(m, g)
    assert not mismatch(s, g * g)


def test_the_usual_form_of_an_average_leaves_its_fixed_point() -> None:
    """float32 `b*s + (1-b)*g*g`: its weights add up to 1 - 1.4e-8, which 1/(1-b) makes 1e-3."""
    g = np.random.default_rng(0).uniform(0.5, 2, 32).astype(np.float32)
    square = g * g
    beta, rest = np.float32(0.99999), np.float32(1 - 0.99999)
    usual = square.copy()
    for _ in range(60_000):
        usual = beta * usual + rest * square
    assert 5e-4 < np.max(np.abs(usual / square - 1)) < 2e-3
    ours, p = square.copy(), np.zeros_like(g)
    for step in range(1000, 1100):
        fs.fused_adam_step(p, g, g.copy(), ours, step=step, lr=0.0, betas=(0.9, 0.99999))
    assert not mismatch(ours, square)


@pytest.mark.parametrize("start", [0.5, 1.5])
def test_where_an_average_in_float32_comes_to_rest(start: float) -> None:
    """It stops where its next correction is below half an ulp: 0.5 ulp / (1 - beta2) from g*g."""
    g = np.random.default_rng(0).uniform(0.5, 2, 64).astype(np.float32)
    square, p, m = g * g, np.zeros_like(g), g.copy()
    s = np.float32(start) * square
    for step in range(15_000):
        before = s.copy()
        fs.fused_adam_step(p, g, m, s, step=step, lr=0.0, betas=(0.9, 0.999))
    assert not mismatch(s, before)
    distance = (s - square) / np.spacing(square)
    assert np.max(np.abs(distance)) <= 1.05 * 0.5 / (1 - 0.999)
    assert np.all(np.sign(distance) == np.sign(start - 1))


@pytest.mark.usefixtures("isa")
def test_centered_variance_of_a_constant_gradient_is_not_negative() -> None:
    """s - a*a is 0 then but for rounding; PyTorch takes the root of what rounding leaves."""
    p, state = np.zeros(1000, np.float32), {}
    g = np.random.default_rng(0).uniform(-3, 3, 1000).astype(np.float32)
    rounded_below_zero = False
    for _ in range(100):
        state = fs.fused_rmsprop_step(
            p, g, **state, lr=1e-3, alpha=0.25, centered=True, eps=1e-3
        ).state
        s, a = (state[name].astype(np.float64) for name in ("square_avg", "grad_avg"))
        rounded_below_zero |= bool(np.any(s < a * a))
    assert rounded_below_zero
    assert np.all(np.isfinite(p))
    assert np.all(np.sign(p) == -np.sign(g))


# --- limits -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("isa")
@CLASSES
def test_a_gradient_whose_square_overflows(kind: type[fs.Optimizer]) -> None:
    """As the docstrings say: inf in the state, then NaN, and only in that element."""
    p = np.ones(20, np.float32)
    opt = kind([p], lr=0.5, weight_decay=0.0)
    g = np.ones(20, np.float32)
    g[7] = 1.9e19
    opt.step([g])
    name = "square_avg" if kind is fs.RMSprop else "exp_avg_sq"
    square = opt.state_dict()["state"][0][name]
    assert np.flatnonzero(np.isinf(square)).tolist() == [7]
    assert p[7] == 1  # a finite number over infinity
    g[7] = 1
    opt.step([g])
    for found in (square, p):
        assert np.flatnonzero(np.isnan(found)).tolist() == [7]


@pytest.mark.usefixtures("isa")
@CLASSES
def test_the_largest_gradient_whose_square_is_finite(kind: type[fs.Optimizer]) -> None:
    p, g = np.ones(1, np.float32), np.float32([1.8e19])
    for _ in range(3):
        kind([p], lr=0.25, weight_decay=0.0, eps=1.0).step([g])
    assert np.all(np.isfinite(p))
    assert p[0] < 0.5


@pytest.mark.usefixtures("isa")
@EVERY_FORM
def test_lr_zero_changes_no_parameter(kind: type[fs.Optimizer], case: str) -> None:
    p = start(np.float32)
    opt = kind([p], **{**papers.CASES[kind][case], "lr": 0.0})
    for _ in range(3):
        opt.step([np.ones(SIZE, np.float32)])
    assert not mismatch(p, start(np.float32))
    assert opt.state_dict()["state"][0]["step"] == 3


@pytest.mark.usefixtures("isa")
@CLASSES
def test_zero_gradients_move_nothing(kind: type[fs.Optimizer]) -> None:
    """0 / (0 + eps) is 0; with eps = 0 it would be NaN."""
    p = np.ones(3)
    opt = kind([p], weight_decay=0.0)
    for _ in range(3):
        opt.step([np.zeros(3)])
    assert np.all(p == 1)


# --- what is counted --------------------------------------------------------------------------

OPTIONS: dict[type[fs.Optimizer], dict[str, Any]] = {
    fs.NAdam: {"momentum_decay": 0.3},
    fs.Adam: {"amsgrad": True},
    fs.AdamW: {},
    fs.RMSprop: {"centered": True, "momentum": 0.9},
}


@CLASSES
def test_arrays_without_gradients_do_not_age(kind: type[fs.Optimizer]) -> None:
    """Bias correction and momentum product are an array's own (MXNet shares them)."""
    options, formula = OPTIONS[kind], papers.FORMULAS[kind]
    h = papers.hypers(kind, **options)
    arrays = [start(np.float64) for _ in range(3)]
    expected, states, counts = [a.copy() for a in arrays], [{}, {}, {}], [0, 0, 0]
    opt = kind(arrays, **options)
    for t, g in enumerate(course(np.float64)):
        present = [True, t % 2 == 0, t > 90]
        opt.step([g if here else None for here in present])
        for k in (k for k, here in enumerate(present) if here):
            counts[k] += 1
            expected[k] = formula(h, counts[k], expected[k], g, states[k])
    assert counts == [100, 50, 9]
    entries = opt.state_dict()["state"]
    assert [entries[k]["step"] for k in range(3)] == counts
    for k, (p, q) in enumerate(zip(arrays, expected, strict=True)):
        assert not far(p, q, 1e-12)
        if kind is fs.NAdam:
            assert not far(entries[k]["mu_product"], states[k]["mu_product"], 1e-12)
    assert opt.steps == STEPS


SWITCHES: list[tuple[type[fs.Optimizer], str, list[Any]]] = [
    (fs.Adam, "amsgrad", [False, True, False, True]),
    (fs.AdamW, "amsgrad", [True, False, True]),
    (fs.RMSprop, "centered", [False, True, False, True]),
    (fs.RMSprop, "momentum", [0.0, 0.9, 0.0, 0.5]),
]


@pytest.mark.parametrize(
    ("kind", "name", "values"), SWITCHES, ids=lambda v: getattr(v, "__name__", v)
)
def test_switched_forms_keep_the_state_that_exists(
    kind: type[fs.Optimizer], name: str, values: list[Any]
) -> None:
    """A buffer is made when its form first applies, and waits, by name, while it does not."""
    p, expected, theirs = start(np.float64), start(np.float64), {}
    opt = kind([p], **{name: values[0]})
    for t, g in enumerate(course(np.float64), 1):
        value = opt.param_groups[0][name] = values[min(t // 5, len(values) - 1)]
        opt.step([g])
        expected = papers.FORMULAS[kind](
            papers.hypers(kind, **{name: value}), t, expected, g, theirs
        )
    assert not far(p, expected, 1e-12)
    assert set(opt.state_dict()["state"][0]) == {*theirs, "step"}


# --- arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"step": -1}, ValueError, r"step: expected an integer in \[0, 2\*\*62\), got -1"),
        ({"step": 2**62}, ValueError, r"step: .*got 4611686018427387904"),
        ({"step": 1.0}, TypeError, r"step: .*got 1\.0"),
        ({"step": True}, TypeError, r"step: .*got True"),
        ({"step": "1"}, TypeError, r"step: .*got '1'"),
        ({"step": None}, TypeError, r"step: .*got None"),
        ({"mu_product": -0.1}, ValueError, r"mu_product: expected a number in \[0, 1\], got -0\.1"),
        ({"mu_product": 1.5}, ValueError, r"mu_product: .*got 1\.5"),
        ({"mu_product": float("nan")}, ValueError, r"mu_product: .*got nan"),
        ({"mu_product": "1"}, TypeError, r"mu_product: .*got '1'"),
        ({"betas": (1.0, 0.999)}, ValueError, r"betas\[0\]: .*got 1\.0"),
        ({"betas": (0.9, -0.1)}, ValueError, r"betas\[1\]: .*got -0\.1"),
        ({"betas": 0.9}, TypeError, r"betas: expected a pair of numbers in \[0, 1\), got 0\.9"),
        ({"betas": (0.9,)}, ValueError, r"betas: .*got 1 of them"),
        ({"betas": ("a", 0.9)}, TypeError, r"betas\[0\]: .*got 'a'"),
        ({"eps": -1e-8}, ValueError, r"eps: .*got -1e-08"),
        ({"eps": None}, TypeError, r"eps: .*got None"),
        ({"momentum_decay": -1.0}, ValueError, r"momentum_decay: .*got -1\.0"),
        ({"momentum_decay": float("inf")}, ValueError, r"momentum_decay: .*got inf"),
        ({"grad_clip_scope": "arrays"}, ValueError, r"grad_clip_scope: .*got 'arrays'"),
        ({"grad_clip_scope": None}, TypeError, r"grad_clip_scope: .*got None"),
        ({"skip_grad_norm": 0.0}, ValueError, r"skip_grad_norm: .*got 0\.0"),
        ({"skip_grad_norm": float("nan")}, ValueError, r"skip_grad_norm: .*got nan"),
        ({"skip_grad_norm": "1"}, TypeError, r"skip_grad_norm: .*got '1'"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(
    arguments: dict[str, Any], kind: type[Exception], text: str
) -> None:
    p = np.ones(3)
    with pytest.raises(kind, match=f"^{text}"):
        fs.fused_nadam_step(p, np.ones(3), **{"lr": 0.1, **arguments})
    assert np.all(p == 1)
    if not arguments.keys() & {"step", "mu_product"}:
        with pytest.raises(kind, match=f"^{text}"):
            fs.NAdam([p], **arguments)


@pytest.mark.parametrize(
    ("function", "state"),
    [
        (fs.fused_adam_step, "max_exp_avg_sq"),
        (fs.fused_adamw_step, "max_exp_avg_sq"),
        (fs.fused_rmsprop_step, "grad_avg"),
        (fs.fused_rmsprop_step, "momentum_buffer"),
    ],
)
def test_state_of_another_form_is_refused(function: Any, state: str) -> None:
    """It would be left behind without a word."""
    p = np.ones(3)
    with pytest.raises(ValueError, match=rf"^{state}: {function.__name__} keeps no such state"):
        function(p, np.ones(3), lr=0.1, **{state: np.zeros(3)})
    assert np.all(p == 1)


def test_eps_of_rmsprop_in_the_root() -> None:
    """g / sqrt(s + eps) for g / (sqrt(s) + eps): 2 / sqrt(1 + 3), and centered, of s - a**2."""
    for centered, root in ((False, 4.0), (True, 3.75)):
        p = np.zeros(1)
        fs.fused_rmsprop_step(
            p, np.array([2.0]), lr=1.0, alpha=0.75, eps=3.0, centered=centered, eps_in_root=True
        )
        assert p[0] == -2.0 / root**0.5


@pytest.mark.parametrize("options", [{}, {"momentum": 0.0}])
def test_nesterov_of_rmsprop_needs_momentum(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"nesterov: needs momentum > 0, got momentum = 0\.0"):
        fs.RMSprop([np.ones(3)], nesterov=True, **options)
    opt = fs.RMSprop([np.ones(3)], nesterov=True, momentum=0.5)
    opt.param_groups[0]["momentum"] = 0.0
    with pytest.raises(ValueError, match="nesterov: needs momentum > 0"):
        opt.step([np.ones(3)])


@pytest.mark.parametrize(
    ("kind", "options"), OPTIONS.items(), ids=lambda v: getattr(v, "__name__", "")
)
def test_state_splats_back(kind: type[fs.Optimizer], options: dict[str, Any]) -> None:
    """`r.state` has all arguments of the next call, of trees and of single arrays."""
    function = papers.FUNCTIONS[kind]
    single, tree, state, states = np.ones(3), {"a": [np.ones(3)], "b": np.ones(())}, {}, {}
    for t in range(3):
        g = np.arange(3.0) + t
        state = function(single, g, **state, lr=0.1, **options).state
        states = function(tree, {"a": [g], "b": np.ones(())}, **states, lr=0.1, **options).state
    assert not mismatch(single, tree["a"][0])
    assert state.keys() == states.keys()
    scalars = {"step", "mu_product"} & state.keys()
    assert all(state[name] == states[name] for name in scalars)
    assert state.get("step", 3) == 3
    assert all(list(states[name]) == ["a", "b"] for name in states.keys() - scalars)


# --- the third seed page ----------------------------------------------------------------------


class Parameter(np.ndarray):
    """An array with a `.grad`, as lucid's parameters have one."""

    grad: Array | None = None


def test_lucid_examples() -> None:
    """The page's loop and its positional order, with arrays in place of its tensors."""
    param = np.array([1.0, 2.0, 3.0]).view(Parameter)
    optimizer = fs.NAdam(
        iter([param]), lr=0.001, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01,
        momentum_decay=0.004,
    )  # fmt: skip
    h = papers.hypers(fs.NAdam, lr=0.001, weight_decay=0.01)
    expected, theirs = np.array([1.0, 2.0, 3.0]), {}
    data = [(np.array([1.0, -1.0, 2.0]) + k, np.ones(3)) for k in range(5)]
    for t, (x, target) in enumerate(data, 1):
        optimizer.zero_grad()
        assert param.grad is None
        param.grad = np.asarray(2 * (x * param - target) * x)
        expected = papers.nadam(h, t, expected, param.grad.copy(), theirs)
        optimizer.step()
    assert not far(np.asarray(param), expected, 1e-12)

    twin = np.array(param).view(Parameter)
    positional = fs.NAdam([twin], 0.001, (0.9, 0.999), 1e-8, 0.01, 0.004)
    positional.load_state_dict(optimizer.state_dict())
    for each, optimizer_of in ((param, optimizer), (twin, positional)):
        each.grad = np.ones(3)
        optimizer_of.step()
    assert not mismatch(np.asarray(param), np.asarray(twin))


def test_arrays_of_one_count_may_differ_in_their_product() -> None:
    """They came through other momenta: each goes on by its own product."""
    together, alone = [np.ones(3), np.ones(3)], np.ones(3)
    pair, single = fs.NAdam(together, lr=0.1), fs.NAdam([alone], lr=0.1)
    for step in range(3):
        pair.step([np.full(3, 0.5)] * 2)
        single.step([np.full(3, 0.5)])
        if step == 0:
            state = pair.state_dict()
            state["state"][1]["mu_product"] = 0.3
            pair.load_state_dict(state)
            single.set_state(mu_product=0.3)
    products = [entry["mu_product"] for entry in pair.state_dict()["state"].values()]
    assert products[0] != products[1]
    assert products[1] == single.state_dict()["state"][0]["mu_product"]
    assert (together[1] == alone).all()
    assert not (together[0] == alone).any()
