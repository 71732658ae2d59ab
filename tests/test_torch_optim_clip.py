"""Clipping and judging gradients inside the step, against torch's clip outside of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from torch_twins import (
    FORMS,
    SHAPES,
    difference,
    equal,
    give_gradients,
    ours,
    parameters,
    parameters_of,
    run,
    snapshot,
    torch,
    unchanged,
)

pytestmark = pytest.mark.framework("torch")


def grouped(kind: str = "SGD", dtype: str = "float32", **kwargs: Any) -> Any:
    """Two groups, of which the second has hyper-parameters of its own."""
    params = parameters(SHAPES, dtype)
    groups = [{"params": params[:5]}, {"params": params[5:], "lr": 0.02}]
    return getattr(ours, kind)(groups, **{"lr": 0.1, **kwargs})


def norm_of(params: Any) -> float:
    grads = [p.grad for p in params if p.grad is not None]
    total: float = torch.cat([g.detach().double().flatten() for g in grads]).norm().item()
    return total


def gradients(opt: Any) -> list[Any]:
    return [p.grad.clone() for p in parameters_of(opt)]


# --- by norm ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", FORMS)
def test_as_gradients_scaled_by_hand(name: str, dtype: str) -> None:
    """The coefficient is `max / norm`; torch's clip divides by `norm + 1e-6` instead.

    In float64 the step on gradients that were multiplied by our coefficient is the same to
    rounding, and torch's clip differs by what its 1e-6 makes.
    """
    mine, by_hand, by_torch = (grouped(name, dtype) for _ in range(3))
    for group in mine.param_groups:
        group["grad_clip_norm"] = 0.5
    for step in range(3):
        for opt in (mine, by_hand, by_torch):
            give_gradients(parameters_of(opt), step)
        mine.step()
        norm = norm_of(parameters_of(by_hand))
        assert abs(mine.last.grad_norm - norm) <= 1e-14 * norm
        assert mine.last.clip_coef == 0.5 / mine.last.grad_norm
        for p in parameters_of(by_hand):
            p.grad.mul_(mine.last.clip_coef)
        theirs = torch.nn.utils.clip_grad_norm_(parameters_of(by_torch), 0.5).item()
        assert abs(theirs - norm) < 1e-5 * norm
        by_hand.step()
        by_torch.step()
    # eps = 1e-8 of the adaptive ones does not scale with the gradient; lr = 0.1, 3 steps
    assert difference(mine, by_hand) < (1e-12 if dtype == "float64" else 1e-6)
    assert difference(mine, by_torch) < 1e-5


@pytest.mark.parametrize("name", FORMS)
def test_gradients_are_not_rewritten(name: str) -> None:
    """torch's clip leaves clipped gradients behind; the step leaves them as they are."""
    opt = grouped(name, grad_clip_norm=0.5, grad_clip_value=1e-3)
    give_gradients(parameters_of(opt), 0)
    before = [(p.grad, p.grad.clone(), p.grad._version) for p in parameters_of(opt)]
    opt.step()
    for p, (grad, value, version) in zip(parameters_of(opt), before, strict=True):
        assert p.grad is grad
        assert torch.equal(grad, value)
        assert grad._version == version


@pytest.mark.parametrize("name", FORMS)
def test_an_inactive_clip_gives_the_same_bits(name: str) -> None:
    """torch multiplies by a coefficient of 1; here nothing happens, and infinity measures only."""
    for limit in (1e6, float("inf")):
        clipped, plain = grouped(name, grad_clip_norm=limit), grouped(name)
        run(clipped, 2)
        run(plain, 2)
        assert equal(clipped, plain)
        assert clipped.last.clip_coef == 1.0
        assert clipped.grad_norm.item() > 0
        assert plain.grad_norm is None


def test_norm_over_all_groups_and_dtypes() -> None:
    params = [*parameters(SHAPES), *parameters(SHAPES, "float64"), *parameters(SHAPES, "bfloat16")]
    opt = ours.SGD([{"params": params[:7]}, {"params": params[7:]}], lr=0.1, grad_clip_norm=0.5)
    give_gradients(params, 0)
    opt.step()
    assert abs(opt.last.grad_norm - norm_of(params)) <= 1e-14 * norm_of(params)


def test_norm_of_complex_gradients() -> None:
    """That of the absolute values, as in torch."""
    param = torch.nn.Parameter(torch.randn(33, dtype=torch.complex128))
    opt = ours.SGD([param], lr=1.0, grad_clip_norm=0.5)
    give_gradients([param], 0)
    before = param.detach().clone()
    opt.step()
    norm = param.grad.abs().square().sum().sqrt().item()
    assert abs(opt.last.grad_norm - norm) <= 1e-14 * norm
    assert (param - (before - param.grad * (0.5 / norm))).abs().max() < 1e-14


def test_groups_with_limits_of_their_own() -> None:
    """Each group is clipped by its limit on the norm of all gradients."""
    opt, plain = grouped(dtype="float64"), grouped(dtype="float64")
    for each in (opt, plain):
        give_gradients(parameters_of(each), 0)
    norm = norm_of(parameters_of(opt))
    for k, limit in enumerate((0.5, 0.25)):
        opt.param_groups[k]["grad_clip_norm"] = limit
        plain.param_groups[k]["rescale_grad"] = limit / norm
    opt.step()
    plain.step()
    assert opt.last.clip_coef == 0.25 / opt.last.grad_norm
    assert difference(opt, plain) < 1e-14


@pytest.mark.parametrize("scope", ["group", "array"])
def test_scopes(scope: str) -> None:
    """The norm of each group, or of each parameter, is limited; the one reported is that of all."""
    opt, plain = grouped(dtype="float64", grad_clip_scope=scope), grouped(dtype="float64")
    for group in opt.param_groups:
        group["grad_clip_norm"] = 0.5
    for step in range(2):
        for each in (opt, plain):
            give_gradients(parameters_of(each), step)
        whole = norm_of(parameters_of(plain))
        sets = [g["params"] for g in plain.param_groups]
        if scope == "array":
            sets = [[p] for p in parameters_of(plain)]
        for params in sets:
            norm = norm_of(params)
            for p in params:
                p.grad.mul_(min(1.0, 0.5 / norm) if norm else 1.0)
        opt.step()
        plain.step()
        assert abs(opt.last.grad_norm - whole) <= 1e-14 * whole
    assert difference(opt, plain) < 1e-14


def test_scope_may_change_between_steps() -> None:
    opt, plain = (grouped(grad_clip_norm=0.5) for _ in range(2))
    opt.grad_clip_scope = "array"
    run(opt, 1)
    run(plain, 1)
    assert not equal(opt, plain)
    opt.grad_clip_scope = "every"
    before = snapshot(opt)
    with pytest.raises(ValueError, match="grad_clip_scope"):
        run(opt, 1)
    assert unchanged(opt, before)


# --- by value ---------------------------------------------------------------------------------


@pytest.mark.parametrize("foreach", [False, True])
def test_clip_by_value(foreach: bool) -> None:
    """`clip_grad_value_` and torch.optim.SGD, to the bit."""
    mine = ours.SGD(parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, grad_clip_value=0.3)
    theirs = torch.optim.SGD(parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, foreach=foreach)
    for step in range(3):
        run(mine, 1, step)
        give_gradients(parameters_of(theirs), step)
        torch.nn.utils.clip_grad_value_(parameters_of(theirs), 0.3)
        theirs.step()
    assert equal(mine, theirs)


def test_norm_first_then_value() -> None:
    mine = ours.SGD(parameters(dtype="float64"), lr=0.1, grad_clip_norm=2.0, grad_clip_value=0.01)
    plain = ours.SGD(parameters(dtype="float64"), lr=0.1)
    for opt in (mine, plain):
        give_gradients(parameters_of(opt), 0)
    mine.step()
    for p in parameters_of(plain):
        p.grad.mul_(mine.last.clip_coef).clamp_(-0.01, 0.01)
    plain.step()
    assert difference(mine, plain) < 1e-15


# --- gradients that are not finite, or too large ----------------------------------------------


def spoil(opt: Any, value: float, step: int = 7) -> None:
    give_gradients(parameters_of(opt), step)
    parameters_of(opt)[6].grad[77] = value


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_raise(name: str, clips: bool, value: float) -> None:
    """Parameters, state, counts and version counters are those of before; so are gradients."""
    kwargs = {"grad_clip_norm": 0.5} if clips else {}
    opt = grouped(name, on_nonfinite="raise", **kwargs)
    for steps in (0, 2):
        run(opt, steps)
        spoil(opt, value)
        before, grads, last = snapshot(opt), gradients(opt), opt.last
        with pytest.raises(
            FloatingPointError,
            match=r"^param_groups\[1\]\['params'\]\[1\]\.grad holds inf or NaN; nothing",
        ):
            opt.step()
        assert unchanged(opt, before)
        for p, grad in zip(parameters_of(opt), grads, strict=True):
            assert torch.equal(p.grad.nan_to_num(), grad.nan_to_num())
        assert opt.last is last
        assert opt.skipped_steps == 0
    plain = grouped(name, **kwargs)
    run(plain, 2)
    run(opt, 1, 2)
    run(plain, 1, 2)
    assert equal(opt, plain)


@pytest.mark.parametrize("name", FORMS)
def test_skip(name: str) -> None:
    opt, plain = grouped(name, on_nonfinite="skip"), grouped(name)
    for step in range(4):
        if step % 2:
            spoil(opt, float("nan"))
            before = snapshot(opt)
            opt.step()
            assert unchanged(opt, before)
            assert opt.last.skipped
        else:
            run(opt, 1, step)
            run(plain, 1, step)
            assert not opt.last.skipped
    assert opt.skipped_steps == 2
    assert equal(opt, plain)


def test_propagate_is_what_torch_does() -> None:
    """An inf in one gradient makes NaN of all parameters through the norm, as `clip_grad_norm_`."""
    mine = ours.SGD(parameters(), lr=0.1, grad_clip_norm=1.0)
    theirs = torch.optim.SGD(parameters(), lr=0.1)
    for opt in (mine, theirs):
        spoil(opt, float("nan"))
    torch.nn.utils.clip_grad_norm_(parameters_of(theirs), 1.0)
    mine.step()
    theirs.step()
    for p, q in zip(parameters_of(mine), parameters_of(theirs), strict=True):
        assert torch.equal(p.isnan(), q.isnan())
        assert p.isnan().all()


def test_gradients_that_are_too_large_are_skipped() -> None:
    """`skip_grad_norm`: by the norm of all, after `rescale_grad`; it may change between steps."""
    opt, plain = grouped(skip_grad_norm=1e-3), grouped()
    before = snapshot(opt)
    run(opt, 1)
    assert unchanged(opt, before)
    assert opt.last.skipped
    assert opt.last.grad_norm > 1e-3
    opt.skip_grad_norm = opt.last.grad_norm
    run(opt, 1)
    run(plain, 1)
    assert not opt.last.skipped
    opt.skip_grad_norm = opt.last.grad_norm * (1 - 1e-15)
    run(opt, 1)
    assert opt.last.skipped
    for group in opt.param_groups:
        group["rescale_grad"] = 0.5
    run(opt, 1)
    assert not opt.last.skipped
    assert opt.skipped_steps == 2
    opt.skip_grad_norm = -1.0
    with pytest.raises(ValueError, match="skip_grad_norm"):
        run(opt, 1)


def test_policies_travel_with_copies() -> None:
    opt = grouped(on_nonfinite="skip", grad_clip_scope="array", skip_grad_norm=5.0)
    twin = copy.deepcopy(opt)
    assert (twin.on_nonfinite, twin.grad_clip_scope, twin.skip_grad_norm) == ("skip", "array", 5.0)


@pytest.mark.parametrize("kind", ["shape", "dtype"])
def test_a_refused_gradient_changes_nothing(kind: str) -> None:
    """The last gradient of the last group is wrong: the first parameter has not moved."""
    opt = grouped("Adam")
    run(opt, 1)
    give_gradients(parameters_of(opt), 1)
    before = snapshot(opt)
    last = parameters_of(opt)[-1]
    wrong = torch.ones(3) if kind == "shape" else torch.ones(last.shape, dtype=torch.int8)
    grads = {id(p): p.grad for p in parameters_of(opt)} | {id(last): wrong}
    with pytest.raises((TypeError, ValueError), match=r"^param_groups\[1\]\['params'\]\[2\]\.grad"):
        opt._advance(grads)
    assert unchanged(opt, before)
    run(opt, 1, 1)
