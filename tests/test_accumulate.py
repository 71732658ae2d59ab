"""Gradients accumulated over several passes: sums, norms, refusals, and when they are used up."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Sequence
from typing import Any

import fusedstep as fs
import numpy as np
import objects
import pytest
import reference
from exact import BFLOAT16, Array, load, mismatch

SIZES = (3, 0, 129, 40_000)
PENDING = r"wait for a step"


def random(seed: int, dtype: Any = np.float32) -> list[Array]:
    return [x.astype(dtype) for x in objects.arrays(seed, sizes=SIZES)]


def sums_of(passes: Sequence[Sequence[Array]], scales: Sequence[float], dtype: Any) -> list[Array]:
    """The oracle's: each product and sum rounded once, in the parameter's arithmetic type."""
    sums = [np.zeros(n, reference.arithmetic_of(np.dtype(dtype))) for n in SIZES]
    for t, (grads, scale) in enumerate(zip(passes, scales, strict=True)):
        for total, g in zip(sums, grads, strict=True):
            reference.apply_coefficients(
                "accumulate", [float(t > 0), scale], total, load(g, total.dtype), ()
            )
    return sums


def same(got: Sequence[Array], expected: Sequence[Array]) -> bool:
    return not any(mismatch(a, b) for a, b in zip(got, expected, strict=True))


def told(result: fs.StepResult) -> tuple[Any, ...]:
    norms = result.grad_norms
    return result.grad_norm, result.clip_coef, result.skipped, None if norms is None else [*norms]


# --- sums -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [fs.SGD, fs.MomentumNesterov, fs.NAdam, fs.RMSprop])
def test_two_halves_are_a_whole(make: Any) -> None:
    """g/2 twice: exact, so the bits are those of one step with g."""
    params, twins = random(1), random(1)
    opt, twin = make(params, grad_clip_norm=1.0), make(twins, grad_clip_norm=1.0)
    for t in range(3):
        whole = random(10 + t)
        for _ in range(2):
            opt.accumulate([g / 2 for g in whole])
        assert told(opt.step()) == told(twin.step(whole))
    assert same(params, twins)
    assert opt.steps == 3


@pytest.mark.usefixtures("isa", "threads")
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("param", "grad"),
    [
        (np.float32, np.float32),
        (np.float32, np.float16),
        (np.float32, np.float64),
        (np.float64, np.float64),
        (np.float64, np.float32),
        (np.float16, np.float16),
        (BFLOAT16, BFLOAT16),
        (BFLOAT16, np.float32),
    ],
    ids=str,
)
def test_bits_of_sums_and_norms(param: Any, grad: Any, count: int) -> None:
    """Those of a step with the oracle's sums: float32 sums for 16-bit parameters, too."""
    fs.set_num_threads(count)
    scales = (0.3, 1.0, -0.7)
    params, twins = random(1, param), random(1, param)
    opt = fs.Adam(params, lr=0.1, grad_clip_norm=0.5)
    twin = fs.Adam(twins, lr=0.1, grad_clip_norm=0.5)
    for t in range(2):
        passes = [random(100 * t + k, grad) for k in range(3)]
        for grads, scale in zip(passes, scales, strict=True):
            opt.accumulate(grads, scale=scale)
        sums = sums_of(passes, scales, param)
        result = opt.step()
        assert told(result) == told(twin.step(sums))
        assert result.grad_norm == reference.norm(sums)
    assert same(params, twins)


def test_sixteen_bits_do_not_lose_small_gradients() -> None:
    p = np.zeros(1, np.float16)
    opt = fs.SGD([p], lr=1.0)
    for _ in range(4096):
        opt.accumulate([np.array([2.0**-14], np.float16)])
    opt.step()
    assert p[0] == -0.25


def test_strided_gradients_in_trees() -> None:
    params = {"w": np.zeros((3, 4), np.float32), "b": [np.zeros(2)]}
    opt = fs.SGD(params, lr=1.0)
    grad = np.arange(12.0).reshape(4, 3).T
    opt.accumulate({"b": [np.ones(1).repeat(4)[::2]], "w": grad})
    opt.accumulate({"b": [np.ones(2)], "w": np.asfortranarray(grad)}, scale=2)
    opt.step()
    np.testing.assert_array_equal(params["w"], -3 * grad)
    np.testing.assert_array_equal(params["b"][0], [-3, -3])


def test_arrays_without_gradients_in_some_passes() -> None:
    """Nothing is added for them; without any they are left alone."""
    params = [np.zeros(1) for _ in range(4)]
    opt = fs.Momentum(params, lr=1.0, grad_clip_norm=math.inf)
    one = np.ones(1)
    opt.accumulate([one, None, None, None])
    opt.accumulate([one, 3 * one, None, None])
    opt.accumulate([None, one, 7 * one, None])
    result = opt.step()
    assert [p[0] for p in params] == [-2.0, -4.0, -7.0, 0.0]
    assert result.grad_norms.tolist() == [2.0, 4.0, 7.0, 0.0]
    assert list(opt.state_dict()["state"]) == [0, 1, 2]


def test_groups() -> None:
    a, b = np.zeros(1), np.zeros(1)
    opt = fs.SGD(
        [{"params": {"a": a}, "lr": 1.0}, {"params": b, "rescale_grad": 0.5}],
        lr=0.5, grad_clip_norm=math.inf,
    )  # fmt: skip
    for _ in range(2):
        opt.accumulate([{"a": np.array([1.5])}, np.array([4.0])])
    with pytest.raises(ValueError, match=r"grads: expected a list of 2 trees"):
        opt.accumulate({"a": np.ones(1)})
    result = opt.step()
    assert (a[0], b[0]) == (-3.0, -2.0)
    assert (result.grad_norm, result.grad_norms.tolist()) == (5.0, [3.0, 4.0])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("scope", ["all", "group", "array"])
def test_scopes(scope: str) -> None:
    params, twins = random(1), random(1)
    options = {"lr": 0.1, "grad_clip_norm": 0.5, "grad_clip_scope": scope}
    opt, twin = (
        fs.NAdam([{"params": p[:2]}, {"params": p[2:], "grad_clip_norm": 0.25}], **options)
        for p in (params, twins)
    )
    passes = [random(10), random(11)]
    for grads in passes:
        opt.accumulate([grads[:2], grads[2:]])
    sums = sums_of(passes, (1.0, 1.0), np.float32)
    assert told(opt.step()) == told(twin.step([sums[:2], sums[2:]]))
    assert same(params, twins)


def test_copies_and_given_norms() -> None:
    p, low = np.zeros(1, np.float32), np.zeros(1, np.float16)
    opt = fs.SGD([p], lr=1.0, grad_clip_norm=1.0)
    opt.accumulate([np.ones(1)])
    result = opt.step(grad_norm=4.0, param_copy=[low])
    assert (result.grad_norm, p[0], low[0]) == (4.0, -0.25, -0.25)


# --- gradients are read once ------------------------------------------------------------------


def test_gradients_are_not_kept_or_read_again() -> None:
    grads = random(2)
    params, twins = random(1), random(1)
    opt, twin = (fs.SGD(p, lr=0.1, grad_clip_norm=0.5) for p in (params, twins))
    twin.step([g.copy() for g in grads])
    opt.accumulate(grads)
    last = weakref.ref(grads[3])
    for g in grads:
        g[...] = np.nan
    opt.step()
    assert same(params, twins)
    del grads, g
    assert last() is None


def sum_buffers(opt: fs.Optimizer) -> list[Array]:
    """What the plan holds beside parameters; optimizers without state have nothing else."""
    known = {id(p) for group in opt.param_groups for p in group["params"]}
    held = gc.get_referents(opt._plan)
    return [x for x in held if isinstance(x, np.ndarray) and id(x) not in known]


def test_the_norm_is_that_of_the_passes() -> None:
    """The step does not read the sums for it: what is put into them behind its back is not seen."""
    params = [np.zeros(40_000, np.float32)]
    opt = fs.SGD(params, lr=1.0, grad_clip_norm=1e9)
    opt.accumulate([np.ones(40_000, np.float32)])
    (sums,) = sum_buffers(opt)
    sums[...] = 3
    result = opt.step()
    assert result.grad_norm == 200.0
    assert np.all(params[0] == -3)


def test_buffers_are_used_again() -> None:
    """What an earlier step left in them does not matter, not even NaN."""
    params = [np.zeros(3, np.float32)]
    opt = fs.SGD(params, lr=1.0, on_nonfinite="skip")
    opt.accumulate([np.full(3, np.nan)])
    before = sum_buffers(opt)
    assert opt.step().skipped
    opt.accumulate([np.ones(3)])
    opt.step()
    assert np.all(params[0] == -1)
    assert [id(x) for x in sum_buffers(opt)] == [id(x) for x in before]
    assert [x.dtype for x in before] == [np.float32]


# --- non-finite and extreme gradients -----------------------------------------------------------


@pytest.mark.usefixtures("isa")
def test_a_skipped_step_uses_the_sums_up() -> None:
    p = np.ones(2)
    opt = fs.NAdam({"w": p}, lr=0.1, on_nonfinite="skip")
    opt.accumulate({"w": np.array([1.0, np.inf])})
    opt.accumulate({"w": np.ones(2)})
    assert opt.step().skipped
    assert np.all(p == 1)
    assert opt.state_dict()["state"] == {}
    opt.accumulate({"w": np.ones(2)})
    assert not opt.step().skipped
    assert (opt.steps, opt.skipped_steps) == (1, 1)
    opt.skip_grad_norm = 1.0
    opt.accumulate({"w": np.ones(2)})
    result = opt.step()
    assert (result.skipped, result.grad_norm) == (True, math.sqrt(2))
    opt.step({"w": np.full(2, 0.25)})


@pytest.mark.usefixtures("isa")
def test_a_step_that_raises_keeps_the_sums() -> None:
    """The message names the array; after the cause is gone the same step can be taken."""
    a, b = np.ones(20_000), np.ones(2)
    opt = fs.SGD({"a": a, "b": [b]}, lr=1.0, on_nonfinite="raise")
    opt.accumulate({"a": np.ones(20_000), "b": [np.array([1.0, np.nan])]})
    for _ in range(2):
        with pytest.raises(FloatingPointError, match=r"grads\['b'\]\[0\]"):
            opt.step()
    assert np.all(a == 1)
    opt.on_nonfinite = "propagate"
    opt.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match=r"lr: .*got -1\.0"):
        opt.step()
    opt.param_groups[0]["lr"] = 0.5
    opt.step()
    assert np.all(a == 0.5)
    assert b[0] == 0.5
    assert np.isnan(b[1])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("scope", ["all", "array"])
@pytest.mark.parametrize("mode", ["propagate", "skip", "raise"])
@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_sums_beyond_the_range_of_squares(scope: str, mode: str, scale: float) -> None:
    """The chunk sums that the passes leave are inf or 0 then; the step has a second look."""
    params = [np.zeros(2), np.zeros(20_000)]
    opt = fs.SGD(params, lr=1.0, grad_clip_norm=scale, on_nonfinite=mode, grad_clip_scope=scope)
    grads = [np.array([1.5, -2.0]) * scale, np.zeros(20_000)]
    grads[1][-1] = 6 * scale
    for _ in range(2):
        opt.accumulate(grads)
    result = opt.step()
    assert not result.skipped
    assert math.isclose(result.grad_norm, 13 * scale, rel_tol=1e-14)
    assert result.grad_norms == pytest.approx([5 * scale, 12 * scale], rel=1e-14, abs=0)
    first, second = (1 / 13, 1 / 13) if scope == "all" else (1 / 5, 1 / 12)
    np.testing.assert_allclose(params[0], np.array([-3, 4]) * first * scale, rtol=1e-14)
    np.testing.assert_allclose(params[1][-1], -12 * second * scale, rtol=1e-14)


def test_sums_that_overflow_are_nonfinite() -> None:
    p = np.ones(1, np.float32)
    opt = fs.SGD([p], lr=1.0, on_nonfinite="skip")
    for _ in range(2):
        opt.accumulate([np.full(1, 3e38, np.float32)])
    assert opt.step().skipped


# --- refusals ---------------------------------------------------------------------------------


def pending() -> tuple[fs.Optimizer, dict[str, Array]]:
    params = {"a": np.zeros(3), "b": np.zeros(2)}
    opt = fs.SGD(params, lr=1.0)
    opt.accumulate({"a": np.ones(3), "b": np.ones(2)})
    return opt, params


def steps_by_one(opt: fs.Optimizer, params: dict[str, Array]) -> bool:
    """What was accumulated before a refused call is still there, and nothing else."""
    opt.step()
    return all(np.all(p == -1) for p in params.values())


def test_gradients_beside_accumulated_ones_are_refused() -> None:
    opt, params = pending()
    with pytest.raises(ValueError, match=rf"^grads: .*{PENDING}.*zero_grad"):
        opt.step({"a": np.ones(3), "b": np.ones(2)})
    assert opt.steps == 0
    assert steps_by_one(opt, params)
    opt.step({"a": np.ones(3), "b": np.ones(2)})
    assert params["a"][0] == -2


def test_registration_waits_for_the_step() -> None:
    opt, params = pending()
    before = repr(opt)
    for call in (
        lambda: opt.add_param_group({"params": [np.ones(1)], "lr": 0.5}),
        lambda: opt.register_trainable_weights({"c": np.ones(1)}),
        lambda: opt.register_trainable_weights(params),
    ):
        with pytest.raises(ValueError, match=rf"^params: .*{PENDING}|^params: .*zero_grad"):
            call()
        assert repr(opt) == before
        assert len(opt.param_groups) == 1
    assert steps_by_one(opt, params)
    opt.add_param_group({"params": [np.ones(1)]})


@pytest.mark.parametrize(
    ("grads", "kind", "text"),
    [
        ({"a": np.ones(3), "b": np.ones(3)}, ValueError, r"grads\['b'\]: expected shape \(2,\)"),
        ({"a": np.ones(3)}, ValueError, r"grads: missing key 'b'"),
        ({"a": np.ones(3), "b": np.ones(2, int)}, TypeError, r"grads\['b'\]: .*int64"),
        ({"a": np.ones(3), "b": "1"}, TypeError, r"grads\['b'\]: "),
        ([np.ones(3), np.ones(2)], TypeError, r"grads: expected a dict"),
    ],
    ids=range(5),
)
@pytest.mark.parametrize("first", [True, False])
def test_wrong_gradients_change_no_sum(
    grads: Any, kind: type[Exception], text: str, first: bool
) -> None:
    """Not even those of the arrays that come before the wrong one."""
    opt, params = pending()
    if first:
        opt.zero_grad()
    with pytest.raises(kind, match=f"^{text}"):
        opt.accumulate(grads)
    if first:
        assert not opt._plan.has_accumulated()
        opt.accumulate({"a": np.ones(3), "b": np.ones(2)})
    assert steps_by_one(opt, params)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, "1", None, True, 1j])
def test_wrong_scales_are_named(scale: Any) -> None:
    opt, params = pending()
    with pytest.raises((TypeError, ValueError), match=r"^scale: expected a finite number, got"):
        opt.accumulate({"a": np.ones(3), "b": np.ones(2)}, scale=scale)
    assert steps_by_one(opt, params)


def test_rebound_parameters_are_noticed() -> None:
    opt, params = pending()
    params["a"] = np.zeros(3)
    for call in (opt.step, lambda: opt.accumulate({"a": np.ones(3), "b": np.ones(2)})):
        with pytest.raises(ValueError, match=r"params\['a'\].*\[\.\.\.\]"):
            call()
    assert not params["b"].any()


def test_accumulation_needs_parameters() -> None:
    with pytest.raises(ValueError, match="register_trainable_weights"):
        fs.SGD(lr=0.1).accumulate([np.ones(1)])


# --- dropping ---------------------------------------------------------------------------------


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_drops(set_to_none: bool) -> None:
    opt, params = pending()
    opt.zero_grad(set_to_none=set_to_none)
    opt.accumulate({"a": np.ones(3), "b": None})
    opt.step()
    assert (params["a"][0], params["b"][0]) == (-1.0, 0.0)
    opt, params = pending()
    opt.zero_grad(set_to_none=set_to_none)
    opt.step({"a": np.ones(3), "b": np.ones(2)})
    assert params["a"][0] == -1


def test_zero_grad_frees_the_sums() -> None:
    opt = fs.SGD([np.zeros(3)], lr=1.0)
    opt.accumulate([np.ones(3)])
    assert len(sum_buffers(opt)) == 1
    opt.zero_grad(set_to_none=False)
    assert len(sum_buffers(opt)) == 1
    opt.zero_grad()
    assert sum_buffers(opt) == []


def test_sums_are_in_no_state() -> None:
    """As the docstrings say; nothing is copied without them, and no state is loaded beside them."""
    opt, params = pending()
    assert opt.state_dict()["state"] == {}
    with pytest.raises(ValueError, match="gradients wait"):
        copy.deepcopy(opt)
    with pytest.raises(ValueError, match="accumulated"):
        opt.load_state_dict(opt.state_dict())
    assert steps_by_one(opt, params)


# --- gradients of the parameters ----------------------------------------------------------------


class Parameter(np.ndarray):
    """An array with a `.grad`, as frameworks have it."""

    grad: Array | None = None


def test_gradients_from_the_parameters() -> None:
    params = [np.zeros(2).view(Parameter) for _ in range(3)]
    opt = fs.Momentum(params, lr=1.0, momentum=0.5)
    for value in (1.0, 2.0):
        params[0].grad = np.full(2, value)
        params[1].grad = np.full(2, value) if value > 1 else None
        opt.accumulate(scale=0.5)
    opt.step()
    assert [p[0] for p in params] == [-1.5, -1.0, 0.0]
    opt.step()  # without accumulated ones it reads .grad again
    assert [p[0] for p in params] == [-1.5 - 2.75, -1.0 - 2.5, 0.0]
    with pytest.raises(TypeError, match=r"params\[0\]: a .*ndarray has no \.grad"):
        fs.SGD([np.zeros(1)]).accumulate()


def test_zero_grad_between_passes_would_drop_them() -> None:
    """It drops what was accumulated: gradients are cleared by hand between passes."""
    p = np.zeros(2).view(Parameter)
    opt = fs.SGD([p], lr=1.0)
    p.grad = np.ones(2)
    opt.accumulate()
    opt.zero_grad()
    assert p.grad is None
    p.grad = np.full(2, 4.0)
    opt.accumulate()
    opt.step()
    assert np.all(np.asarray(p) == -4)


@pytest.mark.framework("torch")
def test_a_parameter_that_changes_its_size_while_gradients_wait() -> None:
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.zeros(100_003))
    optimizer = fs.SGD([weight], lr=1.0, grad_clip_norm=1e9)
    optimizer.accumulate([torch.ones(100_003)])
    weight.data = torch.zeros(5)
    with pytest.raises(ValueError, match="shape"):
        optimizer.accumulate([torch.ones(5)])
    weight.data = torch.zeros(100_003)
    assert optimizer.step().grad_norm == 100_003**0.5
