"""Invariants, on inputs that Hypothesis makes up."""

from __future__ import annotations

import math
from typing import Any

import fpenv
import fusedstep as fs
import guarded
import numpy as np
import reference
from driver import public_form
from exact import DTYPES, Array, mismatch
from fusedstep import _core
from hypothesis import given
from hypothesis import strategies as st
from test_checkpoints import leaves

SIZES = st.lists(
    st.one_of(st.integers(0, 70), st.integers(16_380, 16_390), st.integers(0, 40_000)),
    min_size=1,
    max_size=6,
)
SEEDS = st.integers(0, 2**32 - 1)
STORAGE = st.sampled_from(list(DTYPES))
FORMS = st.sampled_from([(r, c) for r in reference.RULES for c in reference.RULES[r].cases])
LIMITS = st.fixed_dictionaries(
    {},
    optional={
        "grad_clip_value": st.floats(1e-3, 10),
        "rescale_grad": st.floats(-4, 4).filter(lambda x: x != 0),
        "maximize": st.booleans(),
    },
)


def data(seed: int, sizes: list[int], dtype: str) -> list[Array]:
    return [x.copy() for x in guarded.random_list(np.random.default_rng(seed), dtype, sizes)]


def function_and_options(form: tuple[str, str]) -> tuple[Any, dict[str, Any]]:
    rule, case = form
    return public_form(rule, reference.RULES[rule].hyper(**reference.RULES[rule].cases[case]))


def train(
    form: tuple[str, str], seed: int, sizes: list[int], dtype: str, steps: int = 2, **options: Any
) -> tuple[Any, Any]:
    """Parameters, and the last result, after some steps from a start that `seed` makes."""
    function, hyper = function_and_options(form)
    params, state = data(seed, sizes, dtype), {}
    for t in range(steps):
        result = function(params, data(seed + 1 + t, sizes, dtype), **state, **hyper, **options)
        state = result.state
    return params, result


def same(a: Any, b: Any) -> bool:
    return not any(mismatch(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


@given(FORMS, SEEDS, SIZES, STORAGE, LIMITS, st.integers(2, 9), st.floats(0.1, 100))
def test_threads_and_isas_change_no_bit(
    form: Any, seed: int, sizes: list[int], dtype: str, limits: Any, count: int, clip: float
) -> None:
    seen = []
    try:
        for isa in _core.available_isas():
            _core.force_isa(isa)
            for threads in (1, count):
                fs.set_num_threads(threads)
                seen.append(train(form, seed, sizes, dtype, grad_clip_norm=clip, **limits))
    finally:
        _core.force_isa(None)
        fs.set_num_threads(0)
    for params, result in seen[1:]:
        assert same(params, seen[0][0])
        assert (result.grad_norm, result.clip_coef) == (seen[0][1].grad_norm, seen[0][1].clip_coef)


@given(FORMS, SEEDS, SIZES, STORAGE, LIMITS)
def test_splitting_changes_no_bit(
    form: Any, seed: int, sizes: list[int], dtype: str, limits: Any
) -> None:
    """One long tensor or pieces of it: the same update; the norm agrees to rounding of its sum."""
    pieces, split = train(form, seed, sizes, dtype, grad_clip_norm=math.inf, **limits)
    whole, one = train(form, seed, [sum(sizes)], dtype, grad_clip_norm=math.inf, **limits)
    assert same(np.concatenate(pieces), whole[0])
    assert math.isclose(split.grad_norm, one.grad_norm, rel_tol=1e-14)


@given(FORMS, SEEDS, SIZES, STORAGE, st.randoms(use_true_random=False))
def test_permuting_changes_no_bit(
    form: Any, seed: int, sizes: list[int], dtype: str, random: Any
) -> None:
    function, hyper = function_and_options(form)
    order = list(range(len(sizes)))
    random.shuffle(order)
    params, permuted = data(seed, sizes, dtype), data(seed, sizes, dtype)
    grads = data(seed + 1, sizes, dtype)
    first = function(params, grads, grad_clip_norm=math.inf, **hyper)
    second = function(
        [permuted[k] for k in order], [grads[k] for k in order], grad_clip_norm=math.inf, **hyper
    )
    assert same(permuted, params)
    assert math.isclose(first.grad_norm, second.grad_norm, rel_tol=1e-14)


@given(FORMS, SEEDS, SIZES, STORAGE, LIMITS, st.floats(1.0, 1e6))
def test_inactive_clip_is_none(
    form: Any, seed: int, sizes: list[int], dtype: str, limits: Any, slack: float
) -> None:
    params, result = train(form, seed, sizes, dtype, grad_clip_norm=math.inf, **limits)
    plain, _ = train(form, seed, sizes, dtype, **limits)
    norms = [
        abs(limits.get("rescale_grad", 1.0)) * reference.norm(data(seed + 1 + t, sizes, dtype))
        for t in (0, 1)
    ]
    clipped, last = train(
        form, seed, sizes, dtype, grad_clip_norm=max(*norms, 1e-9) * slack, **limits
    )
    assert result.grad_norm == norms[1] == last.grad_norm
    assert last.clip_coef == 1.0
    assert same(params, plain)
    assert same(clipped, plain)


@given(FORMS, SEEDS, SIZES, STORAGE, LIMITS)
def test_no_learning_rate_no_change(
    form: Any, seed: int, sizes: list[int], dtype: str, limits: Any
) -> None:
    function, hyper = function_and_options(form)
    params = data(seed, sizes, dtype)
    hyper.update(lr=0.0)
    function(params, data(seed + 1, sizes, dtype), **hyper, **limits)
    assert same(params, data(seed, sizes, dtype))


@given(SEEDS, SIZES, STORAGE, LIMITS)
def test_no_momentum_is_sgd(seed: int, sizes: list[int], dtype: str, limits: Any) -> None:
    heavy, _ = train(("momentum", "no momentum"), seed, sizes, dtype, **limits)
    plain, _ = train(("sgd", "plain"), seed, sizes, dtype, **limits)
    assert same(heavy, plain)


@given(FORMS, SEEDS, SIZES, STORAGE, st.integers(1, 3))
def test_caller_that_flushes_denormals(
    form: Any, seed: int, sizes: list[int], dtype: str, threads: int
) -> None:
    """All values and their squares are denormal; the same under another rounding direction."""
    tiny = {"float64": 2.0**-1030, "float16": 2.0**-20}.get(dtype, 2.0**-130)
    function, hyper = function_and_options(form)

    def run() -> tuple[list[Array], Any]:
        # Not below the normal numbers, which Python itself would read as zero.
        return params, function(params, grads, grad_clip_norm=max(tiny, 2.0**-1000), **hyper)

    fs.set_num_threads(threads)
    try:
        start = [(x * tiny).astype(DTYPES[dtype]) for x in data(seed, sizes, "float64")]
        grads = [(x * tiny).astype(DTYPES[dtype]) for x in data(seed + 1, sizes, "float64")]
        params = [x.copy() for x in start]
        expected, result = run()
        for environment in (fpenv.flush_to_zero, fpenv.round_upward):
            params = [x.copy() for x in start]
            with environment():
                got, flushed = run()
            assert same(got, expected)
            assert flushed.grad_norm == result.grad_norm
    finally:
        fs.set_num_threads(0)


@given(FORMS, SEEDS, STORAGE, st.integers(0, 99), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_nonfinite_elements_stay_in_their_place(
    form: Any, seed: int, dtype: str, position: int, bad: float
) -> None:
    """Without a norm clip, and with one that only measures."""
    function, hyper = function_and_options(form)
    params, clean = data(seed, [100], dtype), data(seed, [100], dtype)
    grads, clean_grads = data(seed + 1, [100], dtype), data(seed + 1, [100], dtype)
    grads[0][position] = bad
    function(params, grads, grad_clip_norm=math.inf, **hyper)
    function(clean, clean_grads, **hyper)
    others = np.arange(100) != position
    assert same(params[0][others], clean[0][others])


@given(FORMS, SEEDS, SIZES, STORAGE, st.integers(0, 10**6), st.sampled_from([math.nan, math.inf]))
def test_skipping_leaves_every_byte(
    form: Any, seed: int, sizes: list[int], dtype: str, position: int, bad: float
) -> None:
    sizes = [*sizes, 1]
    function, hyper = function_and_options(form)
    params, grads = data(seed, sizes, dtype), data(seed + 1, sizes, dtype)
    flat = [
        (k, i)
        for k, g in enumerate(grads)
        for i in ({0, g.size // 2, g.size - 1} if g.size else ())
    ]
    tensor, element = flat[position % len(flat)]
    grads[tensor][element] = bad
    result = function(params, grads, **hyper, on_nonfinite="skip")
    assert result.skipped
    assert {v for k, v in result.state.items() if k in reference.RULES[form[0]].slots} <= {None}
    assert result.state.get("step", 0) == 0
    assert result.state.get("mu_product", 1.0) == 1.0
    assert same(params, data(seed, sizes, dtype))


@given(SEEDS, SIZES, STORAGE, st.integers(1, 3))
def test_saved_state_continues_with_the_same_bits(
    seed: int, sizes: list[int], dtype: str, when: int
) -> None:
    def make(params: list[Array]) -> fs.MomentumNesterov:
        schedule = fs.StepLR(base_lr=0.1, step_size=2, gamma=0.5)
        return fs.MomentumNesterov(params, lr=schedule, dampening=0.2, weight_decay=0.01)

    def go(opt: Any, steps: range) -> None:
        for t in steps:
            opt.step(data(seed + 1 + t, sizes, dtype))
            opt.lr_scheduler.step()

    straight, resumed = data(seed, sizes, dtype), data(seed, sizes, dtype)
    go(make(straight), range(4))
    first = make(resumed)
    go(first, range(when))
    second = make(resumed)
    second.load_state_dict(first.state_dict())
    go(second, range(when, 4))
    assert same(resumed, straight)


@given(SEEDS, SIZES, STORAGE)
def test_norm_is_that_of_the_tree(seed: int, sizes: list[int], dtype: str) -> None:
    grads = data(seed, sizes, dtype)
    assert fs.sum_squares(grads) == reference.sum_squares(grads)


@given(
    SEEDS,
    st.lists(st.integers(1, 12), min_size=1, max_size=4),
    st.permutations([0, 1, 2, 3]),
    st.permutations([0, 1, 2, 3]),
    st.lists(st.sampled_from([1, 2, -1, -2]), min_size=4, max_size=4),
    STORAGE,
)
def test_any_layout_of_gradients(
    seed: int,
    shape: list[int],
    order: list[int],
    grad_order: list[int],
    steps: list[int],
    dtype: str,
) -> None:
    """Parameters in any dimension order, gradients in any other, with gaps and reversed axes."""
    rank = len(shape)
    order, grad_order = ([k for k in o if k < rank] for o in (order, grad_order))
    values, grads = data(seed, [math.prod(shape)] * 2, dtype)
    values, grads = values.reshape(shape), grads.reshape(shape)
    param = np.ascontiguousarray(values.transpose(order)).transpose(np.argsort(order))
    wide = np.zeros([2 * shape[k] for k in grad_order], grads.dtype).transpose(
        np.argsort(grad_order)
    )
    view = wide[
        tuple(
            slice(None, None, s) if abs(s) == 2 else slice(None, shape[k])
            for k, s in enumerate(steps[:rank])
        )
    ]
    view = view[tuple(slice(None, None, -1) if s < 0 else slice(None) for s in steps[:rank])]
    view[...] = grads
    expected = values.copy()
    fs.fused_sgd_step(expected, grads, lr=0.3, weight_decay=0.1)
    fs.fused_sgd_step(param, view, lr=0.3, weight_decay=0.1)
    assert not mismatch(np.ascontiguousarray(param), expected)
