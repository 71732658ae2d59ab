"""The functions: one array or a tree, state made or passed, results, and what lr may be."""

from __future__ import annotations

import inspect
import math
from typing import Any

import fusedstep as fs
import numpy as np
import pytest
from exact import BFLOAT16, mismatch

STEPS = [fs.fused_sgd_step, fs.fused_momentum_step, fs.fused_nesterov_step]


def ones(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.ones(shape or (3,), dtype)


def test_the_example_of_the_design() -> None:
    params, grads = {"W": ones(2, 3), "b": ones()}, {"W": ones(2, 3), "b": ones()}
    velocity = {"W": np.zeros((2, 3), np.float32), "b": np.zeros(3, np.float32)}
    result = fs.fused_nesterov_step(
        params, grads, velocity, lr=0.01, momentum=0.9, weight_decay=1e-4,
        grad_clip_norm=1.0, grad_clip_value=None,
    )  # fmt: skip
    assert result.grad_norm == 3.0
    assert result.clip_coef == 1 / 3.0
    assert result.skipped is False
    assert result.state["velocity"] is velocity


def test_nesterov_by_hand() -> None:
    """Two steps in float64 with numbers that are exact."""
    p, g = np.array([1.0]), np.array([2.0])
    state: dict[str, Any] = {}
    for expected in (1 - 0.25 * (2 + 0.5 * 2), 0.25 - 0.25 * (2 + 0.5 * 3)):
        result = fs.fused_nesterov_step(p, g, **state, lr=0.25, momentum=0.5)
        state = result.state
        assert p[0] == expected
    assert state["velocity"][0] == 3.0


def test_momentum_by_hand() -> None:
    p, v = np.array([1.0]), np.array([4.0])
    fs.fused_momentum_step(p, np.array([2.0]), v, lr=0.25, momentum=0.5, dampening=0.5)
    assert (v[0], p[0]) == (3.0, 0.25)


def test_passed_buffers_are_used_as_they_are() -> None:
    """Zeros that the caller made are no first step: dampening applies."""
    p, v = np.zeros(1), np.zeros(1)
    fs.fused_momentum_step(p, np.ones(1), v, lr=1.0, dampening=0.75)
    assert (p[0], v[0]) == (-0.25, 0.25)


def test_first_step_is_not_dampened() -> None:
    p = np.zeros(1)
    result = fs.fused_momentum_step(p, np.ones(1), lr=1.0, dampening=0.75)
    assert (p[0], result.state["velocity"][0]) == (-1.0, 1.0)
    p = np.zeros(1)
    fs.fused_momentum_step(p, np.ones(1), lr=1.0, dampening=0.75, dampen_first_step=True)
    assert p[0] == -0.25


@pytest.mark.usefixtures("isa")
def test_first_velocity_is_the_gradient_itself() -> None:
    """v = g, not 0.9*0 + g: the sign of zero stays."""
    grad = np.full(20, -0.0, np.float32)
    state = fs.fused_momentum_step(np.zeros(20, np.float32), grad, lr=1.0).state
    assert not mismatch(state["velocity"], grad)


def test_state_of_single_arrays_and_trees() -> None:
    single = fs.fused_momentum_step(ones(), ones(), lr=0.1).state["velocity"]
    assert isinstance(single, np.ndarray)
    params = {"a": [ones(), (ones(2), ones())], "b": ones(4, 5)}
    grads = {"b": ones(4, 5), "a": [ones(), (ones(2), ones())]}
    state = fs.fused_momentum_step(params, grads, lr=0.1).state["velocity"]
    assert list(state) == ["a", "b"]
    assert isinstance(state["a"], list)
    assert isinstance(state["a"][1], tuple)
    assert state["b"].shape == (4, 5)
    again = fs.fused_momentum_step(params, grads, state, lr=0.1).state["velocity"]
    assert again is state


def test_state_of_generators_is_a_list() -> None:
    arrays = [ones(), ones(2)]
    state = fs.fused_momentum_step(iter(arrays), iter([ones(), ones(2)]), lr=0.1).state
    assert [v.shape for v in state["velocity"]] == [(3,), (2,)]
    fs.fused_momentum_step(iter(arrays), iter([ones(), ones(2)]), **state, lr=0.1)
    assert state["velocity"][0][0] == np.float32(0.9) + 1


@pytest.mark.parametrize(
    ("param", "state"),
    [
        (np.float32, np.float32),
        (np.float64, np.float64),
        (np.float16, np.float32),
        (BFLOAT16, np.float32),
    ],
    ids=str,
)
def test_dtype_and_strides_of_made_state(param: Any, state: Any) -> None:
    p = np.asfortranarray(ones(4, 3, dtype=param))
    made = fs.fused_momentum_step(p, ones(4, 3, dtype=param), lr=0.1).state["velocity"]
    assert made.dtype == state
    assert made.flags.f_contiguous
    assert not made.flags.c_contiguous


def test_leaves_whose_gradient_comes_later() -> None:
    """A None leaf of the state marks that parameter's first step, later than its neighbour's."""
    params = [np.zeros(1), np.zeros(1)]
    options = {"lr": 1.0, "momentum": 0.5, "dampening": 0.5}
    state = fs.fused_momentum_step(params, [np.ones(1), None], **options).state
    assert state["velocity"][1] is None
    state = fs.fused_momentum_step(params, [np.ones(1), np.ones(1)], **state, **options).state
    assert [p[0] for p in params] == [-2.0, -1.0]
    assert [v[0] for v in state["velocity"]] == [1.0, 1.0]


def test_sgd_has_no_state() -> None:
    result = fs.fused_sgd_step(ones(), ones(), lr=0.1)
    assert result.state == {}
    fs.fused_sgd_step(ones(), ones(), **result.state, lr=0.1)


@pytest.mark.parametrize("step", STEPS, ids=lambda f: f.__name__)
def test_param_copy_is_a_tree_too(step: Any) -> None:
    params = {"a": np.full(3, 1 + 2.0**-12, np.float32), "b": [ones(2)]}
    copies = {"a": np.zeros(3, np.float16), "b": [np.zeros(2, BFLOAT16)]}
    step(params, {"a": ones(), "b": [ones(2)]}, lr=0.3, param_copy=copies)
    assert not mismatch(copies["a"], params["a"].astype(np.float16))
    assert not mismatch(copies["b"][0], params["b"][0].astype(BFLOAT16))


def test_param_copy_of_some() -> None:
    params, copy = [ones(), ones()], np.zeros(3, np.float16)
    fs.fused_sgd_step(params, [ones(), ones()], lr=0.5, param_copy=[None, copy])
    assert copy[0] == 0.5


def test_what_lr_may_be() -> None:
    schedule = fs.ExponentialLR(base_lr=0.5, gamma=0.5)
    schedule.step()
    for lr in (
        0.25,
        np.float64(0.25),
        np.float32(0.25),
        np.array(0.25),
        np.array([0.25], np.float32),
        schedule,
    ):
        p = np.zeros(1)
        fs.fused_sgd_step(p, np.ones(1), lr=lr)
        assert p[0] == -0.25
    p = np.zeros(1)
    fs.fused_sgd_step(p, np.ones(1), lr=1)
    assert p[0] == -1.0
    with pytest.raises(TypeError, match=r"lr: .*f\(t\)"):
        fs.fused_sgd_step(p, np.ones(1), lr=lambda t: 0.1 * t)
    with pytest.raises((TypeError, ValueError), match="lr"):
        fs.fused_sgd_step(p, np.ones(1), lr=np.array([0.1, 0.2]))
    assert p[0] == -1.0


def test_a_step_does_not_move_the_schedule() -> None:
    schedule = fs.StepLR(base_lr=0.5, step_size=1, gamma=0.5)
    for _ in range(3):
        fs.fused_sgd_step(np.zeros(1), np.ones(1), lr=schedule)
    assert (schedule.last_epoch, schedule.current_lr) == (0, 0.5)


def test_scalars_of_other_types() -> None:
    """NumPy scalars and integers are numbers."""
    p, q = np.zeros(2), np.zeros(2)
    fs.fused_momentum_step(
        p,
        np.ones(2),
        lr=np.float64(0.1),
        momentum=np.float64(0.5),
        maximize=np.True_,
        grad_clip_norm=1,
    )
    fs.fused_momentum_step(q, np.ones(2), lr=0.1, momentum=0.5, maximize=True, grad_clip_norm=1.0)
    np.testing.assert_array_equal(p, q)


@pytest.mark.parametrize("step", STEPS, ids=lambda f: f.__name__)
def test_signature(step: Any) -> None:
    """Arrays first, the rest by keyword; lr alone has no default."""
    parameters = inspect.signature(step).parameters
    assert list(parameters)[:2] == ["params", "grads"]
    required = [n for n, p in parameters.items() if p.default is inspect.Parameter.empty]
    assert required == ["params", "grads", "lr"]
    positional = [n for n, p in parameters.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert positional == ["params", "grads", *([] if step is fs.fused_sgd_step else ["velocity"])]
    shared = {
        "grad_clip_norm",
        "grad_clip_value",
        "grad_norm",
        "rescale_grad",
        "maximize",
        "on_nonfinite",
        "param_copy",
    }
    assert shared <= set(parameters)
    assert step.__doc__
    assert step.__module__.startswith("fusedstep")


def test_result_is_read_only_and_readable() -> None:
    result = fs.fused_sgd_step(ones(), ones(), lr=0.1, grad_clip_norm=math.inf)
    assert isinstance(result, fs.StepResult)
    assert "grad_norm=1.73" in repr(result)
    with pytest.raises(AttributeError):
        result.grad_norm = 0.0
