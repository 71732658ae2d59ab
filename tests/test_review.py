"""What a hostile review found: each test failed once."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import fpenv
import fusedstep as fs
import numpy as np
import pytest
import subprocesses
from exact import Array


def ones(n: int = 2) -> Array:
    return np.ones(n)


class Exporter:
    """An array that runs code when it is read."""

    def __init__(self, array: Array, callback: Callable[[], Any]) -> None:
        self.array = array
        self.callback: Callable[[], Any] | None = callback

    def __dlpack__(self, **options: Any) -> Any:
        callback, self.callback = self.callback, None
        if callback is not None:
            callback()
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


# --- momentum that is 0 now and then ----------------------------------------------------------


def _walk(optimizer: fs.Optimizer, steps: int = 6) -> list[float]:
    """The values of the one parameter under a schedule that moves with the steps."""
    group, values = optimizer.param_groups[0], []
    for t in range(steps):
        optimizer.step([np.array([1.0 + t % 3])])
        if isinstance(group["momentum"], fs.MomentumSchedule):
            group["momentum"].step()
        values.append(float(group["params"][0][0]))
    return values


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(
    "momentum", [fs.NesterovMomentum(), lambda t: (0.0, 0.0, 0.5, 0.0, 0.9, 0.5, 0.5)[t]]
)
def test_sgd_is_momentum_where_the_schedule_passes_zero(momentum: Any, nesterov: bool) -> None:
    make = fs.MomentumNesterov if nesterov else fs.Momentum
    mine, other = copy.deepcopy(momentum), copy.deepcopy(momentum)
    sgd = fs.SGD([np.zeros(1)], lr=0.5, momentum=mine, nesterov=nesterov)
    assert _walk(sgd) == _walk(make([np.zeros(1)], lr=0.5, momentum=other))


def test_rmsprop_looks_ahead_where_the_schedule_passes_zero() -> None:
    mu = (0.0, 0.0, 0.5, 0.0, 0.75, 0.5)
    p, s, v, expected = 0.0, 0.0, 0.0, []
    for t in range(5):
        s = 0.75 * s + 0.25 * (1.0 + t % 3) ** 2
        u = (1.0 + t % 3) / (math.sqrt(s) + 1e-8)
        v = mu[t] * v + u
        p -= 0.5 * (u + mu[t + 1] * v)
        expected.append(p)
    optimizer = fs.RMSprop(
        [np.zeros(1)], lr=0.5, alpha=0.75, momentum=lambda t: mu[t], nesterov=True
    )
    np.testing.assert_allclose(_walk(optimizer, 5), expected, rtol=1e-13)


def test_a_given_next_momentum_counts_where_the_momentum_is_zero() -> None:
    p = np.zeros(1)
    result = fs.fused_rmsprop_step(
        p, np.ones(1), lr=1.0, alpha=0.0, eps=0.0, momentum=0.0, next_momentum=0.5, nesterov=True
    )
    assert p[0] == -1.5
    assert result.state["momentum_buffer"][0] == 1.0


@pytest.mark.parametrize("make", [fs.SGD, fs.Momentum, fs.RMSprop])
def test_without_a_look_ahead_a_function_is_not_asked_for_the_coming_step(make: Any) -> None:
    optimizer = make([ones()], momentum=lambda t: (0.5, 0.6)[t])
    for _ in range(2):
        optimizer.step([ones()])
    assert optimizer.steps == 2


def test_nadam_looks_ahead_with_the_beta_of_the_coming_step() -> None:
    def beta(t: int) -> float:
        return 0.9 if t % 2 else 0.5

    p = m = s = 0.0
    product = 1.0
    for t in range(1, 6):
        mu = beta(t - 1) * (1 - 0.5 * 0.96 ** (t * 4e-3))
        coming = beta(t) * (1 - 0.5 * 0.96 ** ((t + 1) * 4e-3))
        product *= mu
        m = beta(t - 1) * m + (1 - beta(t - 1))
        s = 0.999 * s + 0.001
        u = (1 - mu) / (1 - product) + coming / (1 - product * coming) * m
        p -= 0.5 * u / (math.sqrt(s / (1 - 0.999**t)) + 1e-8)
    array = np.zeros(1)
    optimizer = fs.NAdam([array], lr=0.5, betas=(beta, 0.999))
    for _ in range(5):
        optimizer.step([np.ones(1)])
    np.testing.assert_allclose(array, [p], rtol=1e-12)


# --- arguments that make no sense -------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "argument", "value"),
    [
        (fs.SGD, "lr", fs.StepLR),
        (fs.SGD, "lr", float),
        (fs.SGD, "weight_decay", fs.StepLR),
        (fs.Momentum, "momentum", fs.SutskeverMomentum),
        (fs.Adam, "betas", (fs.SutskeverMomentum, 0.999)),
    ],
)
def test_a_class_is_no_function_of_t(make: Any, argument: str, value: Any) -> None:
    with pytest.raises(TypeError, match=argument):
        make([ones()], **{argument: value})
    p = ones()
    optimizer = make([p])
    optimizer.param_groups[0][argument] = value
    with pytest.raises(TypeError, match=argument):
        optimizer.step([ones()])
    assert (p == 1).all()


def test_a_function_of_t_gives_a_number_not_a_schedule() -> None:
    with pytest.raises(TypeError, match="lr: the function of t returned"):
        fs.SGD([ones()], lr=lambda t: fs.StepLR(base_lr=t))  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("make", [fs.SGD, fs.RMSprop])
def test_a_flag_that_is_an_array_is_refused_by_name(make: Any) -> None:
    optimizer = make([ones()])
    optimizer.param_groups[0]["nesterov"] = np.array([1, 2])
    with pytest.raises(TypeError, match="nesterov: expected True or False"):
        optimizer.step([ones()])


def test_betas_without_a_length_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match="betas: expected a pair"):
        fs.Adam([ones()], betas=np.array(0.5))  # type: ignore[arg-type]


def test_pairs_are_described_without_addresses_and_contents() -> None:
    def warming(t: int) -> float:
        return 0.5 if t < 10 else 0.9

    assert "betas=(warming, 0.999)" in repr(fs.Adam([ones()], betas=(warming, 0.999)))
    assert "betas=[0.5, 0.999]" in repr(fs.Adam([ones()], betas=[0.5, 0.999]))  # type: ignore[arg-type]
    text = repr(fs.Adam([ones()], betas=(np.array(0.9), 0.999)))  # type: ignore[arg-type]
    assert "betas=(an object of type numpy.ndarray, 0.999)" in text


# --- groups that were taken away, schedules that stand for numbers ----------------------------


def test_groups_that_were_deleted_are_not_forgotten_by_registering_more() -> None:
    groups = [{"params": [ones()], "lr": 0.5}, {"params": [ones()]}]
    optimizer = fs.SGD(groups, lr=0.25)
    del optimizer.param_groups[0]
    with pytest.raises(ValueError, match="param_groups: a group or its 'params' was replaced"):
        optimizer.add_param_group({"params": [ones()]})
    with pytest.raises(ValueError, match="param_groups: a group or its 'params' was replaced"):
        optimizer.lr  # noqa: B018


def test_a_tree_that_was_replaced_is_not_taken_over_by_registering_more() -> None:
    optimizer = fs.SGD([ones()])
    optimizer.param_groups[0]["params"] = [ones()]
    with pytest.raises(ValueError, match="'params' was replaced"):
        optimizer.register_trainable_weights([ones()])


def test_the_schedule_of_a_plain_learning_rate_can_be_assigned_back() -> None:
    optimizer = fs.SGD([ones()], lr=0.5)
    plain = optimizer.lr_scheduler
    optimizer.lr_scheduler = plain
    assert optimizer.lr == 0.5
    optimizer.lr_scheduler = fs.ExponentialLR(base_lr=0.25)
    optimizer.lr_scheduler = plain
    assert optimizer.lr == 0.25


# --- accumulated gradients --------------------------------------------------------------------


@pytest.mark.parametrize("move", [copy.deepcopy, pickle.dumps])
def test_accumulated_gradients_do_not_get_lost_in_a_copy(move: Callable[[Any], Any]) -> None:
    optimizer = fs.SGD([ones()], lr=0.5)
    optimizer.accumulate([ones()])
    with pytest.raises(ValueError, match="gradients wait for a step"):
        move(optimizer)
    optimizer.step()
    move(optimizer)


def test_accumulated_gradients_do_not_get_lost_as_state_is_set() -> None:
    p = ones()
    optimizer = fs.Momentum([p], lr=0.5, momentum=0.5)
    optimizer.accumulate([ones()])
    with pytest.raises(ValueError, match="accumulated for a step"):
        optimizer.set_state(velocity=[ones()])
    optimizer.step()
    assert (p == 0.5).all()


def test_sums_follow_a_parameter_that_changes_its_dtype_or_shape() -> None:
    torch = pytest.importorskip("torch")
    p = torch.zeros(2)
    optimizer = fs.SGD([p], lr=1.0)
    optimizer.accumulate([torch.ones(2)])
    optimizer.step()
    p.data = torch.zeros(2, dtype=torch.float64)
    optimizer.accumulate([torch.full((2,), 1.0 + 2.0**-40, dtype=torch.float64)])
    optimizer.step()
    assert p.tolist() == [-1.0 - 2.0**-40] * 2
    p.data = torch.zeros(3, dtype=torch.float64)
    optimizer.accumulate([torch.ones(3, dtype=torch.float64)])
    optimizer.step()
    assert p.tolist() == [-1.0] * 3


# --- Python code that runs in the middle of a call --------------------------------------------


def test_accumulate_holds_a_gradient_that_an_exporter_drops() -> None:
    # In a process of its own: it read freed memory.
    program = """
        import fusedstep as fs, numpy as np

        class Parameter:
            array, callback = np.zeros(4, np.float32), None

            def __dlpack__(self, **options):
                if self.callback is not None:
                    self.callback()
                return self.array.__dlpack__(**options)

            def __dlpack_device__(self):
                return self.array.__dlpack_device__()

        def drop():
            if grads[0] is not None:
                grads[0] = None
                junk.extend(np.full(4, 7, np.float32) for _ in range(3))

        grads, junk, parameter = [np.ones(4, np.float32)], [], Parameter()
        optimizer = fs.SGD([parameter], lr=1.0)
        parameter.callback = drop
        optimizer.accumulate(grads)
        parameter.callback = None
        optimizer.step()
        print(parameter.array)
    """
    assert subprocesses.run_python(program) == "[-1. -1. -1. -1.]\n"


def test_a_step_holds_a_copy_that_the_property_grad_drops() -> None:
    # In a process of its own: it wrote into freed memory.
    program = """
        import fusedstep as fs, numpy as np

        class Parameter(np.ndarray):
            @property
            def grad(self):
                if copies[0] is not None:
                    copies[0] = None
                    junk.extend(np.full(4, 7, np.float16) for _ in range(3))
                return np.ones(4, np.float32)

        copies, junk = [np.zeros(4, np.float16)], []
        optimizer = fs.SGD([np.zeros(4, np.float32).view(Parameter)], lr=1.0)
        optimizer.step(param_copy=copies)
        print(np.concatenate(junk).tolist() == [7.0] * 12)
    """
    assert subprocesses.run_python(program) == "True\n"


@pytest.mark.parametrize(
    "again",
    [
        lambda optimizer: optimizer.step([ones(), ones()]),
        lambda optimizer: optimizer.accumulate([ones(), ones()]),
        lambda optimizer: optimizer.add_param_group({"params": [ones()]}),
        lambda optimizer: optimizer.zero_grad(),
        lambda optimizer: optimizer.set_state(velocity=[ones(), ones()]),
    ],
    ids=["step", "accumulate", "add_param_group", "zero_grad", "set_state"],
)
@pytest.mark.parametrize("name", ["step", "accumulate"])
def test_an_optimizer_is_not_used_from_within_its_own_call(
    name: str, again: Callable[[fs.Optimizer], Any]
) -> None:
    params = [ones(), ones()]
    optimizer = fs.Momentum(params, lr=0.5, momentum=0.5)
    with pytest.raises((RuntimeError, TypeError), match="already"):
        getattr(optimizer, name)([ones(), Exporter(ones(), lambda: again(optimizer))])
    assert all((p == 1).all() for p in params)
    assert (optimizer.steps, optimizer.state_dict()["state"]) == (0, {})
    optimizer.step([ones(), ones()])
    assert all((p == 0.5).all() for p in params)


# --- norms ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("large", "small"), [(1e200, 1.0), (1.0, 1e-170)])
def test_the_norm_of_a_small_array_beside_a_large_one(large: float, small: float) -> None:
    params, grads = [np.zeros(4), np.zeros(4)], [np.full(4, large), np.full(4, small)]
    result = fs.fused_sgd_step(params, grads, lr=0.0, grad_clip_norm=math.inf)
    np.testing.assert_allclose(result.grad_norms, [2 * large, 2 * small], rtol=1e-14)


def test_norms_of_arrays_are_none_if_the_norm_is_given() -> None:
    result = fs.fused_sgd_step(ones(), ones(), lr=0.5, grad_norm=4.0, on_nonfinite="skip")
    assert result.grad_norms is None


# --- numerics ---------------------------------------------------------------------------------


def test_the_product_of_momenta_ignores_the_rounding_of_the_caller() -> None:
    plain, odd = fs.NAdam([ones()]), fs.NAdam([ones()])
    for _ in range(20):
        plain.step([ones()])
        with fpenv.round_upward():
            odd.step([ones()])
    products = [o.state_dict()["state"][0]["mu_product"] for o in (plain, odd)]
    assert products[0] == products[1]


@pytest.mark.parametrize("beta", [0.999, 0.999999, 1 - 2.0**-40])
def test_the_bias_correction_does_not_cancel(beta: float) -> None:
    # With s = 0 before and eps = 0 the update of step t is lr sqrt((1 - beta^t) / (1 - beta)).
    for t in (1, 2, 7, 100, 10**6):
        p = np.zeros(1)
        state = {"exp_avg": np.zeros(1), "exp_avg_sq": np.zeros(1), "step": t - 1}
        fs.fused_adam_step(p, np.ones(1), **state, lr=1.0, betas=(0.0, beta), eps=0.0)
        correction = -math.expm1(t * math.log1p(-(1 - beta)))
        # Repeated squaring is as good as n * 2^-53 (core/powers.hpp).
        limit = max(1e-14, t * 2.0**-53)
        np.testing.assert_allclose(-p[0], math.sqrt(correction / (1 - beta)), rtol=limit)


# --- schedules --------------------------------------------------------------------------------


def test_nesterovs_sequence_far_out_needs_no_walk() -> None:
    schedule = fs.NesterovMomentum()
    assert math.isclose(1 - schedule.at(10**9), 3 / (10**9 + 2), rel_tol=1e-6)
    assert math.isclose(1 - schedule.at(10**15), 3e-15, rel_tol=0.1)
    a, t = 1.0, 0
    while t < 2**20 + 5:
        a, t, before = (1 + math.sqrt(1 + 4 * a * a)) / 2, t + 1, a
        if t > 2**20 - 5:
            assert math.isclose(schedule.at(t), (before - 1) / a, rel_tol=1e-15)
