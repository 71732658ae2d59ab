"""fusedstep.braintools against braintools 0.3 itself: trajectories of all classes, and the bits."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import brainstates as bs
import fusedstep as fs
import numpy as np
import pytest
from subprocesses import run_python

pytestmark = pytest.mark.framework("braintools")

# Sums of 14 rounded steps. Elements near zero are differences of larger ones, hence an absolute
# part; in float64 both leave two digits to the 1e-12 that are promised.
FLOAT32 = {"rtol": 1e-5, "atol": 2e-6}
FLOAT64 = {"rtol": 1e-12, "atol": 1e-14}
# optax computes 1 - beta**t in float32: at t = 1 and beta = 0.999 its relative error is 3e-5.
CORRECTED = {"rtol": 1e-4, "atol": 1e-4}

CASES: dict[str, tuple[Callable[[Any], Any], dict[str, float]]] = {
    "sgd": (lambda m: m.SGD(0.1), FLOAT32),
    "sgd decay": (lambda m: m.SGD(0.1, weight_decay=0.1), FLOAT32),
    "sgd momentum": (lambda m: m.SGD(0.1, 0.8), FLOAT32),
    "sgd nesterov alone": (lambda m: m.SGD(0.1, nesterov=True), FLOAT32),
    "sgd all": (lambda m: m.SGD(0.1, 0.9, 0.01, True, 50.0, 1.5), FLOAT32),
    "momentum": (lambda m: m.Momentum(0.1), FLOAT32),
    "momentum zero": (lambda m: m.Momentum(0.1, 0.0), FLOAT32),
    "momentum all": (lambda m: m.Momentum(0.1, 0.8, 0.01, 50.0, 1.5), FLOAT32),
    "nesterov": (lambda m: m.MomentumNesterov(0.1), FLOAT32),
    "nesterov norm": (lambda m: m.MomentumNesterov(0.1, grad_clip_norm=50.0), FLOAT32),
    "nesterov value": (lambda m: m.MomentumNesterov(0.1, grad_clip_value=0.5), FLOAT32),
    "nesterov all": (lambda m: m.MomentumNesterov(0.1, 0.8, 0.01, 50.0, 1.5), FLOAT32),
    "adam": (lambda m: m.Adam(0.1), CORRECTED),
    "adam all": (lambda m: m.Adam(0.1, (0.8, 0.99), None, None, 1e-3, 0.1, False, 50.0, 1.5),
                 CORRECTED),
    "adamw": (lambda m: m.AdamW(0.1), CORRECTED),
    "adamw all": (lambda m: m.AdamW(0.1, (0.8, 0.99), 1e-3, 0.1, 50.0, 1.5), CORRECTED),
    "nadam": (lambda m: m.Nadam(0.1), CORRECTED),
    "nadam all": (lambda m: m.Nadam(0.1, (0.8, 0.99), 1e-3, 0.1, 0.1, 50.0, 1.5), CORRECTED),
    "rmsprop": (lambda m: m.RMSprop(0.1), FLOAT32),
    "rmsprop eps": (lambda m: m.RMSprop(0.1, eps=0.1), FLOAT32),
    "rmsprop centered": (lambda m: m.RMSprop(0.1, eps=1e-3, centered=True), FLOAT32),
    "rmsprop all": (lambda m: m.RMSprop(0.1, 0.9, 1e-3, 0.1, 0.9, True, 50.0, 1.5), FLOAT32),
    "schedule": (lambda m: m.MomentumNesterov(m.ExponentialLR(0.1, 0.7), 0.9), FLOAT32),
    "schedule all": (
        lambda m: m.Adam(m.CosineAnnealingLR(0.1, 9, 0.01), weight_decay=0.1, grad_clip_norm=50.0),
        CORRECTED,
    ),
}  # fmt: skip


def move(optimizer: Any, t: int) -> None:  # noqa: ARG001
    optimizer.lr_scheduler.step()


@functools.cache
def result(which: str, case: str, dtype: str) -> list[dict[str, Any]]:
    module = {"ours": bs.ours, "theirs": bs.theirs}[which]
    between = move if case.startswith("schedule") else None
    return bs.run(module, CASES[case][0], np.dtype(dtype), between=between)


@pytest.mark.parametrize("case", CASES)
def test_trajectories_in_float32(case: str) -> None:
    bs.assert_same(
        result("ours", case, "float32"), result("theirs", case, "float32"), **CASES[case][1]
    )


@pytest.mark.parametrize("case", [case for case in CASES if "nadam" not in case])
def test_trajectories_in_float64(case: str) -> None:
    bs.assert_same(result("ours", case, "float64"), result("theirs", case, "float64"), **FLOAT64)


@pytest.mark.parametrize("case", [case for case in CASES if "adam" in case])
def test_float32_is_nearer_to_the_formula_than_braintools(case: str) -> None:
    """The corrections of its moments are rounded once here: as exact as the other classes."""
    exact = result("ours", case, "float64")
    rounded = [{k: v.astype(np.float32) for k, v in step.items()} for step in exact]
    bs.assert_same(result("ours", case, "float32"), rounded, **FLOAT32)


# braintools' Nadam has float32 scalars also for float64 weights: 5e-5 off here.
@pytest.mark.parametrize("case", ["nadam", "nadam all"])
def test_nadam_in_float64(case: str) -> None:
    """The formula is PyTorch's, with which `fusedstep.NAdam` is compared elsewhere."""
    options = {
        "nadam": {},
        "nadam all": {"betas": (0.8, 0.99), "eps": 1e-3, "weight_decay": 0.1,
                      "momentum_decay": 0.1, "grad_clip_norm": 50.0, "grad_clip_value": 1.5},
    }[case]  # fmt: skip
    params = bs.values(1, np.float64)
    optimizer = fs.NAdam(params, lr=0.1, **options)
    history = []
    for t in range(bs.STEPS):
        optimizer.step({k: np.asarray(v) for k, v in gradients64(t).items()})
        history.append({k: v.copy() for k, v in params.items()})
    bs.assert_same(result("ours", case, "float64"), history, rtol=1e-13, atol=1e-15)
    bs.assert_same(result("theirs", case, "float64"), history, **CORRECTED)


def gradients64(t: int) -> dict[str, Any]:
    with bs.precision(np.float64):
        return {k: np.asarray(v) for k, v in bs.gradients(t, np.float64).items()}


@pytest.mark.parametrize(
    ("case", "make"),
    [
        ("sgd decay", lambda p: fs.SGD(p, 0.1, weight_decay=0.1)),
        ("nesterov norm", lambda p: fs.MomentumNesterov(p, 0.1, grad_clip_norm=50.0)),
        ("momentum all", lambda p: fs.Momentum(p, 0.1, 0.8, weight_decay=0.01,
                                               grad_clip_norm=50.0, grad_clip_value=1.5)),
    ],
)  # fmt: skip
def test_the_bits_of_numpy(case: str, make: Callable[[Any], Any]) -> None:
    """What the objects for NumPy arrays compute, to the bit."""
    params = bs.values(1, np.float32)
    optimizer = make(params)
    for t, step in enumerate(result("ours", case, "float32")):
        optimizer.step({k: np.asarray(v) for k, v in bs.gradients(t).items()})
        assert all(step[k].tobytes() == params[k].tobytes() for k in params), t


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_has_float32_state(dtype: str) -> None:
    """braintools keeps the state in the dtype of the weights; this is the better trajectory."""
    weight = bs.brainstate.ParamState(bs.jax.numpy.ones(33, dtype))
    optimizer = bs.ours.Momentum(0.1)
    optimizer.register_trainable_weights({"w": weight})
    optimizer.step({"w": bs.jax.numpy.full(33, 0.5, dtype)})
    assert weight.value.dtype == dtype
    assert optimizer.opt_state.value.velocity["w"].dtype == np.float32


def test_a_missing_brainstate_is_said_by_name() -> None:
    run_python(
        """
        import sys
        sys.modules["brainstate"] = None
        try:
            import fusedstep.braintools
        except ImportError as error:
            assert "fusedstep.braintools needs brainstate" in str(error), error
            assert "fusedstep[braintools]" in str(error)
        else:
            raise AssertionError
        """
    )


def test_braintools_itself_is_not_imported() -> None:
    run_python("import sys, fusedstep.braintools; assert 'braintools' not in sys.modules")


# --- signatures -------------------------------------------------------------------------------

CLASSES = ["SGD", "Momentum", "MomentumNesterov", "Adam", "AdamW", "Nadam", "RMSprop"]
SCHEDULERS = [
    "ConstantLR", "StepLR", "MultiStepLR", "ExponentialLR", "ExponentialDecayLR", "LinearLR",
    "CosineAnnealingLR", "CosineAnnealingWarmRestarts", "PolynomialLR", "WarmupScheduler",
    "WarmupCosineSchedule", "PiecewiseConstantSchedule", "CyclicLR", "OneCycleLR",
    "ReduceLROnPlateau", "ChainedScheduler", "SequentialLR", "LRScheduler",
]  # fmt: skip


@pytest.mark.parametrize("name", CLASSES + SCHEDULERS)
def test_arguments_are_those_of_braintools(name: str) -> None:
    """The same names, order and defaults; what is ours comes after them, by keyword."""
    mine, their = (
        list(inspect.signature(getattr(m, name).__init__).parameters.values())
        for m in (bs.ours, bs.theirs)
    )
    for ours, theirs in zip(mine, their, strict=False):
        assert (ours.name, ours.default, ours.kind) == (theirs.name, theirs.default, theirs.kind)
    assert len(mine) >= len(their)
    assert all(p.kind in {p.KEYWORD_ONLY, p.VAR_KEYWORD} for p in mine[len(their) :])
    shown = inspect.signature(getattr(bs.ours, name))  # what `help` says
    assert list(shown.parameters.values()) == mine[1:] or name == "LRScheduler"


def test_every_public_name_of_braintools_is_there_or_refused_by_name() -> None:
    for name in bs.theirs.__all__:
        if name not in bs.ours.__all__:
            with pytest.raises(AttributeError, match=rf"has no {name}: .*braintools\.optim"):
                getattr(bs.ours, name)
    with pytest.raises(AttributeError, match="has no attribute 'Missing'"):
        _ = bs.ours.Missing
    assert bs.ours.optim is bs.ours


def test_deprecated_betas() -> None:
    for module in (bs.ours, bs.theirs):
        with pytest.warns(DeprecationWarning, match="beta1"):
            optimizer = module.Adam(beta1=0.5)
        assert optimizer.betas == (0.5, 0.999)


def test_what_is_computed_otherwise_is_refused() -> None:
    with pytest.raises(ValueError, match=r"amsgrad: .*bias-corrected.*fusedstep\.jax\.adam"):
        bs.ours.Adam(amsgrad=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.5}, r"momentum: .*\[0, 1\), got 1\.5"),  # braintools takes it
        ({"lr": -0.1}, r"lr: .*>= 0, got -0\.1"),
        ({"weight_decay": -0.1}, r"weight_decay: .*got -0\.1"),
        ({"grad_clip_norm": 0.0}, r"grad_clip_norm: .*got 0\.0"),
        ({"grad_clip_value": -1.0}, r"grad_clip_value: .*got -1\.0"),
        ({"on_nonfinite": "raise"}, r"on_nonfinite: .*skip"),
    ],
)
def test_ranges(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bs.ours.Momentum(**options)


@pytest.mark.parametrize("lr", ["0.1", None, True])
def test_learning_rates_are_numbers_or_schedulers(lr: Any) -> None:
    with pytest.raises(TypeError, match="lr: expected a number"):
        bs.ours.Momentum(lr)


def test_schedulers_of_others_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"lr: .*got an object of type fusedstep.*StepLR"):
        bs.ours.Momentum(fs.StepLR(0.1))
    with pytest.raises(TypeError, match=r"lr: .*got an object of type braintools.*StepLR"):
        bs.ours.Momentum(bs.theirs.StepLR(0.1))


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="nesterov"):
        bs.ours.Momentum(nesterov=True)


def test_further_hyper_parameters() -> None:
    """Those of the class in fusedstep, by keyword."""
    params = bs.values(1, np.float32)
    reference = fs.Momentum(params, 0.1, dampening=0.3, maximize=True, rescale_grad=0.5)
    history = bs.run(
        bs.ours, lambda m: m.Momentum(0.1, dampening=0.3, maximize=True, rescale_grad=0.5)
    )
    for t, step in enumerate(history):
        reference.step({k: np.asarray(v) for k, v in bs.gradients(t).items()})
        assert all(step[k].tobytes() == params[k].tobytes() for k in params), t
