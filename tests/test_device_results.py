"""Results of a device: nothing waits before somebody wants to know."""

from __future__ import annotations

import threading
from typing import Any

import device_arrays
import fusedstep as fs
import numpy as np
import pytest
from device_arrays import Emulator
from device_twins import Twins, check_result, check_same, on_device, on_host, random

pytestmark = pytest.mark.usefixtures("emulator")

WAITS = ("cudaStreamSynchronize", "cudaMemcpyAsync", "cudaEventSynchronize")


def waits(emulator: Emulator) -> int:
    return sum(map(emulator.calls, WAITS[:2]))


def one(kind: type[fs.Optimizer] = fs.SGD, **hypers: Any) -> tuple[Twins, Any]:
    """A step whose result nobody has looked at, after one that has made the state."""
    twins = Twins(kind, random(0), lr=0.1, **hypers)
    twins.step(random(1), lazy=True)
    grads = random(2)
    twins.kept.append(on_device(grads))
    result = twins.gpu.step(twins.kept[-1])
    return twins, (result, twins.cpu.step(grads))


def test_what_is_known_at_once(emulator: Emulator) -> None:
    _, (result, expected) = one()
    before = waits(emulator)
    assert result.settled
    assert tuple(result) == tuple(expected) == (None, 1.0, False, {}, None)
    assert waits(emulator) == before


def test_each_attribute_waits_only_if_it_has_to(emulator: Emulator) -> None:
    _, (result, expected) = one(grad_clip_norm=np.inf)
    before = waits(emulator)
    assert not result.settled
    assert (result.skipped, result.clip_coef, result.state) == (False, 1.0, {})
    assert waits(emulator) == before
    assert result.grad_norm == expected.grad_norm
    known = waits(emulator)
    assert known > before
    assert result.settled
    assert (result.grad_norm, result.clip_coef) == (expected.grad_norm, expected.clip_coef)
    assert waits(emulator) == known
    check_result(result, expected)


@pytest.mark.parametrize("field", ["grad_norm", "clip_coef", "skipped", "grad_norms"])
def test_what_is_not_known_waits(emulator: Emulator, field: str) -> None:
    _, (result, expected) = one(grad_clip_norm=0.5, on_nonfinite="skip")
    before = waits(emulator)
    assert not result.settled
    check_same(getattr(result, field), getattr(expected, field))
    assert waits(emulator) > before
    assert result.settled


def test_the_result_is_a_tuple_too() -> None:
    _, (result, expected) = one(grad_clip_norm=0.5)
    norm, coefficient, skipped, state, norms = result
    assert (norm, coefficient, skipped, state) == tuple(expected)[:4]
    assert norms.tobytes() == expected.grad_norms.tobytes()
    assert len(result) == 5
    assert result[0] == result[-5] == norm
    assert result[1:4] == (coefficient, False, {})
    with pytest.raises(IndexError):
        result[5]
    match result:
        case fs.DeviceStepResult(first, second):
            assert (first, second) == (norm, coefficient)
    text = repr(expected).replace("StepResult", "DeviceStepResult")
    assert repr(result) == text


def test_results_of_the_cpu_are_settled() -> None:
    assert fs.SGD(random(0), lr=0.1).step(random(1)).settled is True


def test_a_result_outlives_its_optimizer(emulator: Emulator) -> None:
    twins, (result, expected) = one(grad_clip_norm=0.5)
    del twins.gpu
    later = fs.SGD(on_device(random(5)), lr=0.1, grad_clip_norm=1.0)
    kept = on_device(random(6))
    other = later.step(kept)
    assert result.grad_norm == expected.grad_norm
    assert other.grad_norm > 0
    assert emulator.fault is None


def test_results_that_nobody_reads(emulator: Emulator) -> None:
    """A loop without a look at them leaves nothing behind."""
    twins = Twins(fs.Adam, random(0), lr=0.1, grad_clip_norm=1.0, on_nonfinite="skip")
    twins.step(random(1), lazy=True)
    before = waits(emulator)
    allocations = None
    for t in range(100):
        twins.step(random(2 + t), lazy=True)
        if t == 50:
            allocations = emulator.count("allocations")
    assert waits(emulator) == before
    assert emulator.count("allocations") == allocations
    twins.check()


def test_older_results_are_still_there() -> None:
    twins = Twins(fs.Adam, random(0), lr=0.1, grad_clip_norm=1.0)
    told, expected = [], []
    for t in range(20):
        grads = random(1 + t)
        twins.kept.append(on_device(grads))
        told.append(twins.gpu.step(twins.kept[-1]))
        expected.append(twins.cpu.step(grads))
    for index in (19, 0, 7, *range(20)):
        check_result(told[index], expected[index])


def test_threads_read_one_result() -> None:
    _, (result, expected) = one(grad_clip_norm=0.5)
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(tuple(result))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    for told in found:
        check_same(told, tuple(expected))


# --- functions: the state ----------------------------------------------------------------------


def moments(make: Any) -> dict[str, Any]:
    zeros = [np.zeros_like(a) for a in random(0)]
    return {"exp_avg": make(zeros), "exp_avg_sq": make([a.copy() for a in zeros])}


def test_the_state_of_a_function_is_known_where_nothing_is_skipped(emulator: Emulator) -> None:
    params, kept = on_device(random(0)), on_device(random(1))
    result = fs.fused_adam_step(params, kept, lr=0.1, grad_clip_norm=1.0)
    before = waits(emulator)
    assert result.state["step"] == 1
    assert waits(emulator) == before
    host = random(0)
    check_result(result, fs.fused_adam_step(host, random(1), lr=0.1, grad_clip_norm=1.0))


@pytest.mark.parametrize("bad", [False, True])
def test_host_counts_wait_where_a_step_may_be_skipped(emulator: Emulator, bad: bool) -> None:
    grads = random(1)
    grads[0][0] = np.nan if bad else 1.0
    params, state, kept = on_device(random(0)), moments(on_device), on_device(grads)
    result = fs.fused_adam_step(params, kept, **state, step=7, lr=0.1, on_nonfinite="skip")
    before = waits(emulator)
    assert result.state["step"] == (7 if bad else 8)
    assert waits(emulator) > before
    assert result.state["exp_avg"] is state["exp_avg"]


def test_rules_without_counts_do_not_wait_for_their_state(emulator: Emulator) -> None:
    params, kept = on_device(random(0)), on_device(random(1))
    velocity = on_device([np.zeros_like(a) for a in random(0)])
    result = fs.fused_momentum_step(params, kept, velocity, lr=0.1, on_nonfinite="skip")
    before = waits(emulator)
    assert result.state == {"velocity": velocity}
    assert waits(emulator) == before


@pytest.mark.parametrize("bad", [False, True])
def test_a_skipped_first_step_hands_out_no_state(bad: bool) -> None:
    grads = random(1)
    grads[3][5] = np.inf if bad else 1.0
    host, params, kept = random(0), on_device(random(0)), on_device(grads)
    options: dict[str, Any] = {"lr": 0.1, "on_nonfinite": "skip", "dampening": 0.5}
    result = fs.fused_momentum_step(params, kept, **options)
    expected = fs.fused_momentum_step(host, grads, **options)
    assert (result.state["velocity"] is None) is bad
    check_result(result, expected)
    check_same(on_host(params), host)


# --- on_nonfinite="raise" -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [fs.SGD, fs.Adam], ids=lambda kind: kind.__name__)
def test_raise_changes_nothing(kind: type[fs.Optimizer]) -> None:
    twins = Twins(kind, {"a": random(0), "b": random(1)}, lr=0.1, on_nonfinite="raise")
    for t in range(4):
        grads = {"a": random(2 + t), "b": random(8 + t)}
        if t in {0, 2}:
            grads["b"][2][100] = np.nan
            for optimizer, make in ((twins.gpu, on_device), (twins.cpu, lambda x: x)):
                made = make(grads)
                twins.kept.append(made)
                with pytest.raises(FloatingPointError, match=r"^grads\['b'\]\[2\] holds inf or Na"):
                    optimizer.step(made)
        else:
            twins.step(grads)
        twins.check()
    assert twins.gpu.steps == 2


def test_raise_settles_the_result(emulator: Emulator) -> None:
    _, (result, expected) = one(grad_clip_norm=1.0, on_nonfinite="raise")
    known = waits(emulator)
    assert result.settled
    assert (result.grad_norm, result.skipped) == (expected.grad_norm, False)
    assert waits(emulator) == known
    check_result(result, expected)


def test_raise_names_a_given_norm() -> None:
    params, kept = on_device(random(0)), on_device(random(1))
    norm = on_device([np.array(np.nan, np.float32)])[0]
    for given in (np.nan, norm):
        with pytest.raises(
            FloatingPointError, match="grad_norm is not finite; nothing was changed"
        ):
            fs.fused_sgd_step(params, kept, lr=0.1, grad_norm=given, on_nonfinite="raise")
    check_same(on_host(params), random(0))


def test_raise_of_a_function() -> None:
    grads = random(1)
    grads[2][7] = -np.inf
    params, kept = on_device(random(0)), on_device(grads)
    with pytest.raises(
        FloatingPointError, match=r"grads\[2\] holds inf or NaN; nothing was changed"
    ):
        fs.fused_adam_step(params, kept, lr=0.1, on_nonfinite="raise")
    check_same(on_host(params), random(0))


# --- the sum of squares ---------------------------------------------------------------------------


def test_sum_squares(emulator: Emulator) -> None:
    grads = [*random(1), None, np.ones((), np.float64)]
    kept = on_device(grads)
    assert fs.sum_squares(kept) == fs.sum_squares(grads)
    stream = emulator.new_stream()
    assert fs.sum_squares(kept, stream=stream) == fs.sum_squares(grads)
    assert fs.sum_squares(on_device([np.zeros(0, np.float32)])) == 0.0
    emulator.set(devices=2)
    mixed = [kept[0], None, on_device([grads[2]], 1)[0]]
    with pytest.raises(ValueError, match=r"grads\[2\] is on cuda:1, but grads\[0\] is on cuda:0"):
        fs.sum_squares(mixed)


def test_functions_share_a_workspace_per_stream(emulator: Emulator) -> None:
    """So that a loop of calls allocates nothing."""
    params, kept = on_device(random(0)), on_device(random(1))
    fs.fused_sgd_step(params, kept, lr=0.1, grad_clip_norm=1.0)
    allocated = emulator.calls("cudaMalloc")
    for _ in range(5):
        fs.fused_sgd_step(params, kept, lr=0.1, grad_clip_norm=1.0)
    assert emulator.calls("cudaMalloc") == allocated
    device_arrays.current_streams[0] = emulator.new_stream()
    fs.fused_sgd_step(params, kept, lr=0.1, grad_clip_norm=1.0)
    assert emulator.calls("cudaMalloc") > allocated


# --- steps that were skipped ----------------------------------------------------------------------


def test_a_rule_without_states_leaves_those_of_another_alone() -> None:
    """The state of a first step that was skipped is none, also after steps without momentum."""
    twins = Twins(fs.SGD, random(0), lr=0.1, momentum=0.9, dampening=0.5, on_nonfinite="skip")
    bad = random(1)
    bad[0][1] = np.inf
    twins.step(bad, lazy=True)
    for seed, momentum in ((2, 0.0), (3, 0.0), (4, 0.9), (5, 0.9)):
        for optimizer in (twins.gpu, twins.cpu):
            optimizer.param_groups[0]["momentum"] = momentum
        twins.step(random(seed), lazy=seed % 2 == 0)
        if seed == 3:
            twins.check()
    twins.check()


# --- other threads --------------------------------------------------------------------------------


def test_who_looks_does_not_disturb_training() -> None:
    twins = Twins(fs.Momentum, random(0), lr=0.1, on_nonfinite="skip")
    stop, errors = threading.Event(), []

    def poll() -> None:
        while not stop.is_set():
            try:
                assert twins.gpu.steps >= 0
                twins.gpu._plan.get_progress(0)
            except Exception as error:
                errors.append(error)

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        for seed in range(30):
            twins.step(random(seed), lazy=True)
    finally:
        stop.set()
        thread.join()
    assert not errors
    twins.check()


def test_tensor_norms_are_fetched_for_who_reads_them(emulator: Emulator) -> None:
    _, (result, expected) = one(grad_clip_norm=0.5)
    copies = emulator.calls("cudaMemcpyAsync")
    assert result.grad_norm == expected.grad_norm
    assert emulator.calls("cudaMemcpyAsync") == copies + 1
    check_same(result.grad_norms, expected.grad_norms)
    fetched = emulator.calls("cudaMemcpyAsync")
    assert fetched > copies + 1
    check_result(result, expected)
    assert emulator.calls("cudaMemcpyAsync") == fetched
