"""Numbers in device memory: read there when the step runs, or by the host where it has to know."""

from __future__ import annotations

from typing import Any

import fusedstep as fs
import numpy as np
import pytest
from device_arrays import DeviceArray, Emulator, to_device
from device_twins import Twins, check_same, on_device, on_host, random
from exact import DTYPES
from fusedstep import _core

pytestmark = pytest.mark.usefixtures("emulator")

FLOATS = ("float16", "bfloat16", "float32", "float64")


def number(value: float, dtype: Any = np.float32, shape: tuple[int, ...] = ()) -> DeviceArray:
    return to_device(np.full(shape, value, dtype))


def waits(emulator: Emulator) -> int:
    return emulator.calls("cudaStreamSynchronize")


# --- learning rate and scale ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("name", ["lr", "rescale_grad"])
def test_a_number_of_the_parameters_device(
    emulator: Emulator, name: str, dtype: str, shape: tuple[int, ...]
) -> None:
    """Nobody waits, and it may change between steps."""
    first = {"lr": 0.125, "rescale_grad": 0.5}
    twins = Twins(fs.Adam, random(0), lr=0.125, rescale_grad=0.5, grad_clip_norm=1.0)
    held = number(first[name], DTYPES[dtype], shape)
    twins.gpu.param_groups[0][name] = held
    twins.step(random(1), lazy=True)
    before = waits(emulator)
    emulator.run()  # so that the change below comes after the first step
    held.array[...] = twins.cpu.param_groups[0][name] = 0.0625
    twins.step(random(2), lazy=True)
    assert waits(emulator) == before
    assert getattr(twins.gpu, name, 0.0625) == 0.0625  # opt.lr reads it, and waits
    twins.check()


def test_a_schedule_of_rates_needs_no_range_check_on_the_device() -> None:
    """Documented: what is read there nobody looks at."""
    param = to_device(np.ones(3, np.float32))
    fs.fused_sgd_step(param, to_device(np.ones(3, np.float32)), lr=number(-1.0))
    assert param.numpy().tolist() == [2.0, 2.0, 2.0]


def test_scales_that_only_the_device_knows() -> None:
    """Groups that differ in them have norms of their own, even if the numbers are the same."""
    groups = [{"params": random(k), "rescale_grad": s} for k, s in enumerate((0.5, 0.5, 0.25))]
    twins = Twins(fs.SGD, groups, lr=0.1, grad_clip_norm=1.0)
    for k, scale in enumerate((0.5, 0.5, 0.25)):
        twins.gpu.param_groups[k]["rescale_grad"] = number(scale)
    grads = [random(5 + k) for k in range(3)]
    on_gpu = on_device(grads)
    result, expected = twins.gpu.step(on_gpu), twins.cpu.step(grads)
    # One tree or several: the norm of parts is the same but for rounding.
    assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-14)
    for mine, other in zip(on_host(twins.params["gpu"]), twins.params["cpu"], strict=True):
        for got, right in zip(mine["params"], other["params"], strict=True):
            np.testing.assert_array_max_ulp(got, right, 1)  # of the coefficient


@pytest.mark.parametrize("where", ["the cpu", "another device"])
def test_numbers_elsewhere_are_read_by_the_host(emulator: Emulator, where: str) -> None:
    emulator.set(devices=2)
    held = number(0.25)
    param, grad = np.ones(3, np.float32), np.ones(3, np.float32)
    if where != "the cpu":
        param, grad = to_device(param, 1), to_device(grad, 1)
    before = waits(emulator)
    fs.fused_sgd_step(param, grad, lr=held, rescale_grad=number(2.0))
    assert waits(emulator) >= before + 2
    assert on_host([param])[0].tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("lr", -1.0, "lr: expected a number >= 0, got -1.0"),
        ("lr", np.nan, "lr: expected a number >= 0, got nan"),
        ("rescale_grad", np.inf, "rescale_grad: expected a finite number, got inf"),
        ("grad_norm", -1.0, "grad_norm: expected a norm >= 0"),
    ],
)
def test_ranges_of_numbers_that_the_host_reads(name: str, value: float, text: str) -> None:
    param = np.ones(3, np.float32)
    given = {"lr": 0.5, name: number(value)}
    with pytest.raises(ValueError, match=text):
        fs.fused_sgd_step(param, np.ones(3, np.float32), **given)
    assert param.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", ["lr", "rescale_grad", "grad_norm", "found_inf"])
@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (np.ones(2, np.float32), ValueError, "expected one number, got an array of 2"),
        (np.ones((), np.uint8), TypeError, "dtype uint8 is not supported"),
    ],
)
def test_what_is_no_number(name: str, value: Any, error: type[Exception], text: str) -> None:
    param = to_device(np.ones(3, np.float32))
    given = {"lr": 0.5, name: to_device(value)}
    with pytest.raises(error, match=f"^{name}: .*{text}"):
        fs.fused_sgd_step(param, to_device(np.ones(3, np.float32)), **given)
    assert param.numpy().tolist() == [1.0, 1.0, 1.0]


def test_momentum_is_read_by_the_host() -> None:
    """Coefficients other than the learning rate are made of numbers."""
    twins = Twins(fs.Momentum, random(0), lr=0.1, momentum=0.5)
    twins.gpu.param_groups[0]["momentum"] = number(0.5)
    for t in range(2):
        twins.step(random(1 + t))
    twins.check()


# --- a given norm ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_given_norm_on_the_device(emulator: Emulator, dtype: str) -> None:
    twins = Twins(fs.SGD, random(0), lr=0.1, grad_clip_norm=1.0, rescale_grad=0.5)
    twins.step(random(1), grad_norm=7.0)
    grads, norm = random(2), number(4.0, DTYPES[dtype])
    kept = on_device(grads)
    before = waits(emulator)
    result = twins.gpu.step(kept, grad_norm=norm)
    assert waits(emulator) == before
    expected = twins.cpu.step(grads, grad_norm=4.0)
    assert tuple(result) == tuple(expected) == (2.0, 0.5, False, {}, None)
    twins.check()


@pytest.mark.parametrize("norm", [np.nan, np.inf])
def test_a_given_norm_is_judged(norm: float) -> None:
    twins = Twins(fs.SGD, random(0), lr=0.1, grad_clip_norm=1.0, on_nonfinite="skip")
    grads = random(1)
    kept = on_device(grads)
    assert twins.gpu.step(kept, grad_norm=number(norm)).skipped
    assert twins.cpu.step(grads, grad_norm=norm).skipped
    twins.check()


# --- what a loss scaler says ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "int64", "bool", "float16"])
def test_found_inf_on_the_device(emulator: Emulator, dtype: str) -> None:
    twins = Twins(fs.Adam, random(0), lr=0.1, grad_clip_norm=1.0)
    twins.step(random(1), found_inf=0.0, lazy=True)
    before = waits(emulator)
    told = []
    for value in (1, 0, 1, 0):
        grads, flag = random(2 + value), number(value, np.dtype(dtype))
        twins.kept += [flag, on_device(grads)]
        told.append(twins.gpu.step(twins.kept[-1], found_inf=flag))
        twins.cpu.step(grads, found_inf=value)
    assert waits(emulator) == before
    assert [result.skipped for result in told] == [True, False, True, False]
    twins.check()
    assert (twins.gpu.steps, twins.gpu.skipped_steps) == (3, 2)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("value", [1, True, 0.5, np.nan, np.float32(2.0), np.ones(1, np.int64)])
def test_found_inf_of_the_host(clip: float | None, value: Any) -> None:
    """Skips on both; a norm is measured if it was asked for."""
    twins = Twins(fs.Momentum, random(0), lr=0.1, grad_clip_norm=clip)
    for flag in (value, 0, value):
        grads = random(1)
        twins.kept.append(on_device(grads))
        result = twins.gpu.step(twins.kept[-1], found_inf=flag)
        expected = twins.cpu.step(grads, found_inf=flag)
        assert result.skipped == expected.skipped
        check_same(tuple(result), tuple(expected))
        assert (result.grad_norm is None) == (clip is None)
    twins.check()
    assert (twins.gpu.steps, twins.gpu.skipped_steps) == (1, 2)


@pytest.mark.parametrize("given", ["1", [1.0], object()])
@pytest.mark.parametrize("name", ["found_inf", "grad_norm"])
def test_what_is_no_flag(name: str, given: Any) -> None:
    for make in (np.copy, to_device):
        param = make(np.ones(3, np.float32))
        with pytest.raises(TypeError, match=name):
            fs.fused_sgd_step(param, make(np.ones(3, np.float32)), lr=0.5, **{name: given})


def step_of_plan(make: Any, scale: Any, found_inf: Any = None) -> tuple[Any, Any]:
    """A step of a plan, as a loss scaler wants it; the result and the parameters."""
    params = [make(a) for a in random(0)]
    grads = [make(a) for a in random(1)]
    plan = _core.Plan([params], ["params"], [])
    rule = _core.rules()["sgd"]
    row = (0.5, False, 1.0, None, 0.1, *[0.0] * (len(rule["hypers"]) - 1))
    policy = ("propagate", "all", None)
    result = plan.step(
        [grads], [(rule["index"], row)], policy, None, None,
        grad_scale=scale, found_inf=found_inf,
    )  # fmt: skip
    told = tuple(result)
    return told, [on_host([p])[0] for p in params]


@pytest.mark.parametrize("scale", [1024.0, 3.0, 0.1])
def test_a_loss_scale_divides_exactly_alike(scale: float) -> None:
    """As a number or in device memory, whoever reads it: rescale_grad * (1 / scale) in double."""
    held = np.array(scale, np.float64)
    expected = step_of_plan(np.copy, scale)
    for make, given in [
        (np.copy, held), (np.copy, to_device(held)), (to_device, scale), (to_device, held),
        (to_device, to_device(held)),
    ]:  # fmt: skip
        check_same(step_of_plan(make, given), expected)
    by_hand = 0.5 * (1.0 / scale) * np.sqrt(fs.sum_squares(random(1)))
    assert expected[0][0] == pytest.approx(by_hand, rel=1e-15)


def test_a_loss_scale_beside_an_overflow() -> None:
    expected = step_of_plan(np.copy, 2.0, 1.0)
    assert expected[0][2]
    check_same(step_of_plan(to_device, to_device(np.float32(2.0)[...]), 1.0), expected)
    flag = to_device(np.ones((), np.float32))
    check_same(step_of_plan(to_device, to_device(np.float32(2.0)[...]), flag), expected)


# --- progress in arrays of the caller's -----------------------------------------------------------


@pytest.mark.parametrize("count", ["float32", "float64", "int32", "int64"])
@pytest.mark.parametrize("product", ["float32", "float64"])
@pytest.mark.parametrize("scope", ["all", "array"])
def test_functions_advance_numbers_in_place(
    emulator: Emulator, count: str, product: str, scope: str
) -> None:
    """With a clip by arrays each has a row of its own: the numbers advance once all the same."""
    step, mu = number(0, np.dtype(count)), number(1.0, np.dtype(product))
    params, zeros = random(0), [np.zeros_like(a) for a in random(0)]
    options: dict[str, Any] = {"lr": 0.1, "grad_clip_norm": 1.0, "grad_clip_scope": scope}
    state = {"exp_avg": zeros, "exp_avg_sq": [a.copy() for a in zeros], "step": 0}
    state["mu_product"] = 1.0
    held = on_device({"params": params, "exp_avg": zeros, "exp_avg_sq": zeros})
    on_gpu = {k: held[k] for k in ("exp_avg", "exp_avg_sq")} | {"step": step, "mu_product": mu}
    kept = []
    before = waits(emulator)
    for t in range(3):
        grads = random(1 + t)
        kept.append(on_device(grads))
        bad = t == 1
        result = fs.fused_nadam_step(
            held["params"], kept[-1], **on_gpu, found_inf=number(bad), **options
        )
        assert result.state["step"] is step
        assert result.state["mu_product"] is mu
        on_gpu = result.state
        state = fs.fused_nadam_step(params, grads, **state, found_inf=bad, **options).state
        if product == "float32":
            state["mu_product"] = float(np.float32(state["mu_product"]))
    assert waits(emulator) == before
    check_same(on_host(held["params"]), params)
    check_same(on_host(on_gpu["exp_avg_sq"]), state["exp_avg_sq"])
    assert step.numpy() == 2
    assert mu.numpy() == state["mu_product"]


def test_numbers_serve_arrays_with_and_without_state() -> None:
    """They have rows of their own, too, and the numbers advance once."""
    step = number(3, np.int64)
    params, average = random(0), [None if a.size == 129 else a * 0 for a in random(0)]
    grads = random(1)
    held, kept = on_device(params), on_device(grads)
    options = {"lr": 0.1}
    squares = [a if a is None else a.copy() for a in average]
    result = fs.fused_adam_step(
        held, kept, exp_avg=on_device(average), exp_avg_sq=on_device(squares), step=step, **options
    )
    fs.fused_adam_step(params, grads, exp_avg=average, exp_avg_sq=squares, step=3, **options)
    check_same(on_host(held), params)
    assert step.numpy() == 4
    assert result.state["step"] is step


@pytest.mark.parametrize(
    ("scalars", "error", "text"),
    [
        ({"step": 0}, TypeError, "step and mu_product: pass both as arrays on the device, or both"),
        ({"mu_product": 1.0}, TypeError, "step and mu_product: pass both as arrays"),
        ({"step": "float16"}, TypeError, r"step: dtype float16 .*float32, float64, int32 or int64"),
        ({"mu_product": "int32"}, TypeError, r"mu_product: dtype int32 .*float32 or float64"),
    ],
)
def test_what_is_no_progress(scalars: dict[str, Any], error: type[Exception], text: str) -> None:
    given: dict[str, Any] = {"step": number(0, np.int64), "mu_product": number(1.0, np.float64)}
    for name, value in scalars.items():
        given[name] = number(1, np.dtype(value)) if isinstance(value, str) else value
    params = on_device(random(0))
    with pytest.raises(error, match=text):
        fs.fused_nadam_step(params, on_device(random(1)), lr=0.1, **given)
    check_same(on_host(params), random(0))


def test_progress_elsewhere(emulator: Emulator) -> None:
    emulator.set(devices=2)
    step = to_device(np.array(0), 1)
    with pytest.raises(ValueError, match="step is on cuda:1, but params are on cuda:0"):
        fs.fused_adam_step(on_device(random(0)), on_device(random(1)), lr=0.1, step=step)
    with pytest.raises(ValueError, match="step is on cuda:1, but params are on cpu"):
        fs.fused_adam_step(random(0), random(1), lr=0.1, step=step)
    with pytest.raises(TypeError, match="step: expected an integer"):
        fs.fused_adam_step(random(0), random(1), lr=0.1, step=np.array(0))


def test_progress_that_overlaps_a_parameter() -> None:
    memory = to_device(np.zeros(4, np.float32))
    step = DeviceArray(memory.array[:1])
    with pytest.raises(BufferError, match=r"(params and step|step and params) overlap"):
        fs.fused_adam_step(memory, to_device(np.ones(4, np.float32)), lr=0.1, step=step)


def test_reading_a_number(emulator: Emulator) -> None:
    for dtype in FLOATS:
        assert _core.read_scalar(number(0.25, DTYPES[dtype])) == 0.25
    assert emulator.calls("cudaStreamSynchronize") == len(FLOATS)
