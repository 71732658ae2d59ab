"""Whose norm clips, what a step tells of norms, and steps that are skipped for theirs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import fusedstep as fs
import numpy as np
import objects
import papers
import pytest
import reference
from exact import Array, mismatch

SCOPES = ("all", "group", "array")
EVERY_SCOPE = pytest.mark.parametrize("scope", SCOPES)
EVERY_CLASS = pytest.mark.parametrize("kind", list(objects.FORMS), ids=lambda k: k.__name__)
GROUPS: list[dict[str, Any]] = [
    {"grad_clip_norm": 2.0},
    {"grad_clip_norm": 0.5, "rescale_grad": 0.25, "weight_decay": 0.1},
    {"rescale_grad": -3.0, "maximize": True},
    {"grad_clip_norm": 1e6, "grad_clip_value": 0.5},
]


def one_norm(groups: Sequence[reference.Group], scope: str) -> list[list[reference.Group]]:
    """The oracle's groups in sets with one norm each."""
    return [list(groups)] if scope == "all" else [[group] for group in groups]


def norms_of(group: reference.Group, grads: Sequence[Array | None]) -> list[float]:
    """The norm of each array, 0 where there is no gradient."""
    return [0.0 if g is None else abs(group.rescale_grad) * reference.norm([g]) for g in grads]


# --- against the oracle -----------------------------------------------------------------------


@pytest.mark.usefixtures("isa")
@EVERY_SCOPE
@pytest.mark.parametrize("alike", [True, False], ids=["alike", "different"])
@EVERY_CLASS
def test_scopes(kind: type[fs.Optimizer], alike: bool, scope: str) -> None:
    """The bits of one oracle step per group or per array, for groups that differ in all limits."""
    options = {**objects.FORMS[kind], "lr": 0.01, "grad_clip_norm": 1.5}
    settings = [{}, {}] if alike else GROUPS
    trees = [objects.arrays(k) for k in range(len(settings))]
    groups = [{"params": p, **own} for p, own in zip(trees, settings, strict=True)]
    opt = kind(groups, **options, grad_clip_scope=scope)
    expected = []  # for "array", a group of the oracle has one array
    for p, own in zip(trees, settings, strict=True):
        parts = [[a] for a in p] if scope == "array" else [p]
        expected.append([objects.oracle(kind, part, **{**options, **own}) for part in parts])
    for t in range(2):
        grads = [objects.arrays(10 * t + k + 50) for k in range(len(settings))]
        clips = []
        flat = list(itertools.chain(*expected))
        parts = [[g] for g in itertools.chain(*grads)] if scope == "array" else grads
        given = dict(zip(map(id, flat), parts, strict=True))
        for together in one_norm(flat, scope):
            clips += objects.advance(together, [given[id(group)] for group in together])[1]
        result = opt.step(grads)
        assert result.clip_coef == min(clips)
        told = [n for own, g in zip(expected, grads, strict=True) for n in norms_of(own[0], g)]
        assert result.grad_norms.tolist() == told
        assert math.isclose(result.grad_norm, math.hypot(*told), rel_tol=1e-14)
    objects.check(opt, list(itertools.chain(*expected)))


@EVERY_SCOPE
def test_scopes_by_hand(scope: str) -> None:
    arrays = [np.zeros(1) for _ in range(3)]
    opt = fs.SGD(
        [{"params": arrays[:2]}, {"params": arrays[2:]}],
        lr=1.0, grad_clip_norm=1.0, grad_clip_scope=scope,
    )  # fmt: skip
    result = opt.step([[np.array([3.0]), np.array([-4.0])], [np.array([0.5])]])
    norm = math.sqrt(25.25)
    expected = {
        "all": (3 / norm, -4 / norm, 0.5 / norm),
        "group": (3 / 5, -4 / 5, 0.5),
        "array": (1.0, -1.0, 0.5),
    }[scope]
    assert [-a[0] for a in arrays] == pytest.approx(expected, rel=1e-15)
    assert math.isclose(result.grad_norm, norm, rel_tol=1e-15)
    assert math.isclose(result.clip_coef, {"all": 1 / norm, "group": 0.2, "array": 0.25}[scope])
    assert result.grad_norms.tolist() == [3.0, 4.0, 0.5]


@pytest.mark.usefixtures("isa")
@EVERY_SCOPE
def test_scope_in_functions(scope: str) -> None:
    """A call has one group, so that "all" and "group" are the same there."""
    params, grads = objects.arrays(1), objects.arrays(2)
    parts = [[k] for k in range(len(params))] if scope == "array" else [range(len(params))]
    expected = [
        objects.oracle(fs.NAdam, [params[k] for k in part], grad_clip_norm=0.5) for part in parts
    ]
    clips = [
        objects.advance([group], [[grads[k] for k in part]])[1]
        for group, part in zip(expected, parts, strict=True)
    ]
    result = fs.fused_nadam_step(params, grads, lr=2e-3, grad_clip_norm=0.5, grad_clip_scope=scope)
    assert not any(map(mismatch, params, itertools.chain(*(group.params for group in expected))))
    assert result.clip_coef == min(itertools.chain(*clips))
    assert result.grad_norms.tolist() == norms_of(expected[0], grads)


@EVERY_SCOPE
def test_scope_can_be_changed_between_steps(scope: str) -> None:
    a, b = np.zeros(1), np.zeros(1)
    opt = fs.SGD([a, b], lr=1.0, grad_clip_norm=1.0)
    opt.grad_clip_scope = scope
    opt.step([np.array([4.0]), np.array([0.5])])
    assert b[0] == (-0.5 if scope == "array" else -0.5 / math.hypot(4, 0.5))
    opt.grad_clip_scope = "arrays"
    with pytest.raises(ValueError, match=r"grad_clip_scope: .*got 'arrays'"):
        opt.step([np.ones(1), np.ones(1)])


# --- float64 beyond the range of squares --------------------------------------------------------


@pytest.mark.usefixtures("isa")
@EVERY_SCOPE
@pytest.mark.parametrize("largest", [1e-300, 1e-170, 1.0, 1e170, 1e300])
def test_extreme_norms(scope: str, largest: float) -> None:
    """Arrays with norms 5, 13 and 1 times a scale, each of a group: all are told, and clip."""
    params = [np.zeros(2), np.zeros(2), np.zeros(20_000)]
    grads = [np.array([3.0, -4.0]), np.array([5.0, 12.0]), np.zeros(20_000)]
    grads[2][-1] = 1.0
    grads = [g * largest for g in grads]
    opt = fs.SGD(
        [{"params": [p]} for p in params],
        lr=1.0, grad_clip_norm=largest / 2, grad_clip_scope=scope,
    )  # fmt: skip
    result = opt.step([[g] for g in grads])
    assert result.grad_norms == pytest.approx(np.array([5, 13, 1]) * largest, rel=1e-14, abs=0)
    total = math.sqrt(195) * largest
    assert math.isclose(result.grad_norm, total, rel_tol=1e-14)
    norms = [total] * 3 if scope == "all" else [5 * largest, 13 * largest, largest]
    for p, g, norm in zip(params, grads, norms, strict=True):
        np.testing.assert_allclose(p, -g * (largest / 2 / norm), rtol=1e-14, atol=0)
    assert math.isclose(result.clip_coef, largest / 2 / max(norms), rel_tol=1e-14)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("scope", SCOPES[1:])
def test_extreme_norms_side_by_side(scope: str) -> None:
    """Norms of their own: neither a huge nor a tiny neighbour costs an array its precision."""
    scales = (1e-300, 1e300, 1.0, 0.0)
    params = [np.zeros(2) for _ in scales]
    opt = fs.SGD(
        [{"params": [p]} for p in params], lr=1.0, grad_clip_norm=0.5, grad_clip_scope=scope
    )
    result = opt.step([[np.array([3.0, 4.0]) * scale] for scale in scales])
    assert result.grad_norms == pytest.approx([5e-300, 5e300, 5.0, 0.0], rel=1e-14, abs=0)
    assert math.isclose(result.grad_norm, 5e300, rel_tol=1e-14)
    for p, expected in zip(params, (1e-300, 0.1, 0.1, 0.0), strict=True):
        np.testing.assert_allclose(p, np.array([-3.0, -4.0]) * expected, rtol=1e-13)


# --- what is told -----------------------------------------------------------------------------


@EVERY_SCOPE
def test_norms_are_in_the_order_of_the_arrays(scope: str) -> None:
    """With 0 for arrays without gradient, and for empty ones."""
    params = {"b": np.zeros(1), "a": [np.zeros((0, 3)), np.zeros(2)], "c": np.zeros(())}
    grads = {"a": [np.zeros((0, 3)), np.array([3.0, 4.0])], "c": None, "b": np.array([-2.0])}
    opt = fs.AdamW(
        [{"params": params}, {"params": [np.zeros(1), np.zeros(1)]}],
        grad_clip_norm=math.inf, grad_clip_scope=scope,
    )  # fmt: skip
    result = opt.step([grads, [None, np.array([1.0])]])
    assert result.grad_norms.dtype == np.float64
    assert result.grad_norms.tolist() == [2.0, 0.0, 5.0, 0.0, 0.0, 1.0]
    assert math.isclose(result.grad_norm, math.sqrt(30), rel_tol=1e-15)
    assert (result.clip_coef, result.skipped) == (1.0, False)
    opt.on_nonfinite = "skip"
    result = opt.step([{"b": None, "a": [None, None], "c": None}, [None, None]])
    assert (result.grad_norm, result.grad_norms.tolist()) == (0.0, [0.0] * 6)


@EVERY_CLASS
def test_nothing_is_told_if_nothing_was_asked(kind: type[fs.Optimizer]) -> None:
    opt = kind([np.ones(3)])
    result = opt.step([np.ones(3)])
    assert (result.grad_norm, result.grad_norms, result.clip_coef) == (None, None, 1.0)
    result = opt.step([np.ones(3)], grad_norm=7.0)
    assert (result.grad_norm, result.grad_norms) == (7.0, None)
    for name, value in (("on_nonfinite", "skip"), ("skip_grad_norm", 1e9)):
        opt = kind([np.ones(3)], **{name: value})
        assert opt.step([np.full(3, 2.0)]).grad_norms.tolist() == [math.sqrt(12)]


@pytest.mark.parametrize("scope", SCOPES[1:])
def test_a_given_norm_is_refused_where_there_are_several(scope: str) -> None:
    """It is that of all gradients; nothing is written."""
    params = [np.ones(1), np.ones(1)]
    opt = fs.SGD([{"params": [p]} for p in params], grad_clip_norm=1.0, grad_clip_scope=scope)
    with pytest.raises(ValueError, match=r"^grad_norm: .*grad_clip_scope"):
        opt.step([[np.ones(1)], [np.ones(1)]], grad_norm=1.0)
    with pytest.raises(ValueError, match=r"^grad_norm: .*grad_clip_scope"):
        fs.fused_sgd_step(
            params, [np.ones(1)] * 2, lr=1.0, grad_norm=1.0, grad_clip_norm=1.0,
            grad_clip_scope="array",
        )  # fmt: skip
    assert [p[0] for p in params] == [1.0, 1.0]
    assert opt.steps == 0


# --- steps that are skipped for their norm ------------------------------------------------------


@pytest.mark.usefixtures("isa")
@EVERY_CLASS
@pytest.mark.parametrize("given", [False, True], ids=["measured", "given"])
def test_a_step_with_a_large_norm_changes_nothing(kind: type[fs.Optimizer], given: bool) -> None:
    """Byte for byte, but for `skipped_steps`; what follows is as if it had not been there."""
    params, twins = objects.arrays(1), objects.arrays(1)
    options = {**objects.FORMS[kind], "lr": lambda t: 0.1 / (t + 1)}
    opt = kind(params, **options, skip_grad_norm=1e3, grad_clip_norm=1.0)
    twin = kind(twins, **options, grad_clip_norm=1.0)
    large = [g * np.float32(1e4) for g in objects.arrays(2)]
    norm = reference.norm(large)

    def bad_step() -> None:
        result = opt.step(large, grad_norm=norm if given else None)
        assert (result.skipped, result.grad_norm) == (True, norm)

    bad_step()
    assert opt.state_dict()["state"] == {}
    for t in range(3):
        grads = objects.arrays(10 + t)
        assert not opt.step(grads, grad_norm=reference.norm(grads) if given else None).skipped
        twin.step(grads)
        bad_step()
    assert (opt.steps, opt.skipped_steps) == (3, 4)
    ours, theirs = opt.state_dict()["state"], twin.state_dict()["state"]
    assert not any(map(mismatch, params, twins))
    for entry, other in zip(ours.values(), theirs.values(), strict=True):
        assert all(not mismatch(np.asarray(entry[k]), np.asarray(other[k])) for k in other)


@pytest.mark.usefixtures("isa")
@EVERY_SCOPE
@pytest.mark.parametrize(
    ("norm", "skipped"),
    [(0.0, False), (5.0, False), (np.nextafter(5.0, 9), True), (np.inf, True), (np.nan, True)],
)
def test_where_the_limit_is(norm: float, skipped: bool, scope: str) -> None:
    """A norm that equals the limit passes; NaN and inf do not, whatever `on_nonfinite` says."""
    p = np.ones(2)
    opt = fs.SGD([p], lr=1.0, skip_grad_norm=5.0, grad_clip_scope=scope)
    assert opt.step([np.array([0.0, norm])]).skipped == skipped
    assert np.array_equal(p, [1, 1]) == (skipped or norm == 0)
    assert (opt.steps, opt.skipped_steps) == (not skipped, skipped)
    p[...] = 1
    assert opt.step([np.zeros(2)], grad_norm=norm).skipped == skipped


@EVERY_SCOPE
def test_the_limit_is_for_all_gradients_after_rescaling(scope: str) -> None:
    """Whatever the scope of the clip: 3 and 4, halved, are 2.5."""
    for limit, skipped in ((2.5, False), (2.4, True)):
        params = [np.zeros(1), np.zeros(1)]
        opt = fs.SGD(
            [{"params": [p]} for p in params],
            lr=1.0, rescale_grad=0.5, skip_grad_norm=limit, grad_clip_norm=1.0,
            grad_clip_scope=scope,
        )  # fmt: skip
        assert opt.step([[np.array([3.0])], [np.array([4.0])]]).skipped == skipped
        assert bool(params[0][0] == 0) == skipped


def test_an_infinite_limit_skips_nothing() -> None:
    p = np.ones(1)
    opt = fs.SGD([p], lr=1.0, skip_grad_norm=math.inf)
    assert not opt.step([np.array([np.nan])]).skipped
    assert np.isnan(p[0])
    opt.skip_grad_norm = -1.0
    with pytest.raises(ValueError, match=r"skip_grad_norm: .*got -1\.0"):
        opt.step([np.ones(1)])


def test_raising_comes_before_skipping() -> None:
    p = np.ones(2)
    opt = fs.Adam([p], skip_grad_norm=1.0, on_nonfinite="raise")
    with pytest.raises(FloatingPointError, match=r"grads\[0\]"):
        opt.step([np.array([1.0, np.nan])])
    assert opt.step([np.full(2, 3.0)]).skipped
    assert np.all(p == 1)
    assert (opt.steps, opt.skipped_steps) == (0, 1)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, options) for kind, options in objects.FORMS.items() if kind is not fs.SGD],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_functional_skips(kind: type[fs.Optimizer], options: dict[str, Any]) -> None:
    """The state of a skipped call splats back: before the first step, and later."""
    function = getattr(fs, kind.declaration.function)
    small, large = np.array([0.3, -0.4]), np.array([30.0, -40.0])
    p, q, state, other = np.ones(2), np.ones(2), {}, {}
    for t in range(3):
        result = function(p, large, **state, lr=0.1, **options, skip_grad_norm=1.0)
        assert (result.skipped, result.grad_norm) == (True, 50.0)
        assert result.state.get("step", t) == t
        state = function(p, small, **result.state, lr=0.1, **options, skip_grad_norm=1.0).state
        other = function(q, small, **other, lr=0.1, **options).state
    assert not mismatch(p, q)
    assert state.keys() == other.keys()
    for name in state:
        assert not mismatch(np.asarray(state[name]), np.asarray(other[name])), name


def test_a_skipped_step_leaves_the_product_of_nadam() -> None:
    p = np.ones(1)
    opt = fs.NAdam([p], skip_grad_norm=1.0)
    h, theirs = papers.hypers(fs.NAdam), {}
    for value in (0.5, 2.0, 0.25, np.nan, 0.75):
        opt.step([np.array([value])])
    for t, value in enumerate((0.5, 0.25, 0.75), 1):
        papers.nadam(h, t, np.ones(1), np.array([value]), theirs)
    entry = opt.state_dict()["state"][0]
    assert entry["step"] == 3
    assert math.isclose(entry["mu_product"], theirs["mu_product"], rel_tol=1e-14)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("scope", ["all", "array"])
def test_norms_of_arrays_far_apart(scope: str) -> None:
    """Each array's norm is its own, however large its neighbours' are."""
    sizes = (3, 20_000, 5, 1, 1)
    scales = (1e-200, 1e200, 1.0, math.inf, 0.0)
    grads = [np.full(n, s) for n, s in zip(sizes, scales, strict=True)]
    grads.append(np.full(4, 3.0, np.float32))
    params = [np.ones_like(g) for g in grads]
    result = fs.fused_sgd_step(
        params, grads, lr=0.0, grad_clip_norm=math.inf, grad_clip_scope=scope
    )
    expected = [s * math.sqrt(n) for n, s in zip(sizes, scales, strict=True)] + [6.0]
    expected[4] = 0.0
    assert np.allclose(result.grad_norms, expected, rtol=1e-14, atol=0)
    assert result.grad_norm == math.inf
    assert [float(x) for x in result.grad_norms] == [reference.norm([g]) for g in grads]


def test_no_gradient_at_all_has_the_norm_zero() -> None:
    params = [np.ones(2), np.ones(3)]
    result = fs.fused_sgd_step(params, [None, None], lr=0.5, grad_clip_norm=1.0)
    assert (result.grad_norm, result.clip_coef, list(result.grad_norms)) == (0.0, 1.0, [0.0, 0.0])
    opt = fs.Momentum(params, lr=0.5, skip_grad_norm=1.0, grad_clip_norm=1.0)
    assert opt.step([None, None]).grad_norm == 0.0
    assert fs.fused_sgd_step(params, [None, None], lr=0.5).grad_norm is None


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_nan_wins_among_coefficients(order: tuple[int, int]) -> None:
    arrays = [np.array([np.nan, 1.0]), np.array([3.0, 4.0])]
    grads = [arrays[k] for k in order]
    params = [np.zeros(2) for _ in grads]
    result = fs.fused_sgd_step(params, grads, lr=1.0, grad_clip_norm=1.0, grad_clip_scope="array")
    assert np.isnan(result.clip_coef)
