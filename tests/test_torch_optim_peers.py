"""Bugs of other optimizers as tests: the right answer, and torch's wrong one where it still is.

Where torch is wrong, the test asserts so: when a new torch is right, this file has to say so. The
reports are named by project and number.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch_twins import (
    NAMES,
    difference,
    equal,
    give_gradients,
    ours,
    pair,
    parameters,
    parameters_of,
    run,
    torch,
)

pytestmark = pytest.mark.framework("torch")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fused_sgd_updates_16_bit_parameters(momentum: float, dtype: str) -> None:
    """pytorch#191763: torch.optim.SGD(fused=True) moves only the last elements on a CPU.

    Its vector loop computes and does not store; 1.0 - 0.5 must be 0.5 everywhere.
    """
    kind = getattr(torch, dtype)
    params = [torch.nn.Parameter(torch.ones(257, dtype=kind)) for _ in range(2)]
    mine = ours.SGD(params[:1], lr=0.5, momentum=momentum)
    theirs = torch.optim.SGD(params[1:], lr=0.5, momentum=momentum, fused=True)
    for p in params:
        p.grad = torch.ones(257, dtype=kind)
    mine.step()
    theirs.step()
    assert torch.equal(params[0], torch.full((257,), 0.5, dtype=kind))
    assert params[1][0].item() == 1.0  # torch 2.13: not updated
    assert params[1][-1].item() == 0.5


def test_overflow_on_the_first_step_leaves_no_momentum() -> None:
    """LibreYOLO#771: torch.optim.SGD(fused=True) keeps a momentum buffer nobody wrote into.

    The kernel returns early, but the buffer counts as begun, so that the next step uses whatever
    `empty_like` found in memory. It is filled here, to see that it is used.
    """
    param = torch.nn.Parameter(torch.ones(8))
    theirs = torch.optim.SGD([param], lr=0.1, momentum=0.9, fused=True)
    param.grad = torch.ones(8)
    theirs.grad_scale, theirs.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    theirs.step()
    assert theirs.state[param]["momentum_buffer"] is not None  # begun by a step that was none
    theirs.state[param]["momentum_buffer"].fill_(7.0)
    theirs.found_inf = torch.tensor(0.0)
    theirs.step()
    right = torch.full((8,), 0.9)
    assert not torch.allclose(param, right)  # torch 2.13: the garbage is in

    param = torch.nn.Parameter(torch.ones(8))
    mine = ours.SGD([param], lr=0.1, momentum=0.9)
    param.grad = torch.ones(8)
    mine.grad_scale, mine.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    mine.step()
    assert param not in mine.state
    mine.found_inf = torch.tensor(0.0)
    mine.step()
    assert torch.equal(param, right)


def test_nesterov_and_dampening_are_not_ignored() -> None:
    """bitsandbytes#2085: both were accepted and had no effect. torch.optim.SGD is right."""
    results = []
    for kwargs in ({}, {"nesterov": True}, {"dampening": 0.5}):
        theirs, mine = pair("SGD", lr=0.1, momentum=0.9, **kwargs)
        run(theirs, 3)
        run(mine, 3)
        assert equal(theirs, mine)
        results.append(torch.cat([p.detach().flatten() for p in parameters_of(mine)]))
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", NAMES)
def test_arithmetic_does_not_depend_on_the_type_of_the_hyper_parameters(name: str) -> None:
    """pytorch#153649: fused kernels compute in double where lr is one, on a GPU: slow, other bits.

    A Python float, a float64 tensor and a float32 tensor of one value give the same bits here.
    """
    exact = 0.0078125  # in float32, too
    opts = [
        getattr(ours, name)(parameters(), lr=lr)
        for lr in (exact, torch.tensor(exact), torch.tensor(exact, dtype=torch.float64))
    ]
    for opt in opts:
        run(opt, 3)
    assert equal(opts[0], opts[1])
    assert equal(opts[0], opts[2])


@pytest.mark.parametrize("missing", ["grad_scale", "found_inf", None])
def test_attributes_of_custom_scalers_are_respected(missing: str | None) -> None:
    """pytorch#123428: `grad_scale` and `found_inf` that a user sets count, each without the other.

    torch.optim.Adam(fused=True) honours them as well.
    """
    mine = ours.Adam(parameters(), lr=0.1)
    theirs = torch.optim.Adam(parameters(), lr=0.1, fused=True)
    plain = ours.Adam(parameters(), lr=0.1)
    for opt, scale in ((mine, 4.0), (theirs, 4.0), (plain, 1.0)):
        if opt is not plain:
            for key, value in (("grad_scale", 4.0), ("found_inf", 0.0)):
                if key != missing:
                    setattr(opt, key, torch.tensor(value))
        give_gradients(parameters_of(opt), 0)
        for p in parameters_of(opt):
            p.grad.mul_(scale if missing != "grad_scale" else 1.0)
        opt.step()
    assert equal(mine, plain)
    assert difference(mine, theirs) < 1e-6  # Adam's first step is of size lr


def test_momentum_accumulates_once_per_step() -> None:
    """Paddle#13664: two updates of one buffer in one step. v = 1, 1.5, 1.75; p = -v, summed."""
    param = torch.nn.Parameter(torch.zeros(33))
    opt = ours.SGD([param], lr=1.0, momentum=0.5)
    position = 0.0
    for velocity in (1.0, 1.5, 1.75):
        param.grad = torch.ones(33)
        opt.step()
        position -= velocity
        assert torch.equal(opt.state[param]["momentum_buffer"], torch.full((33,), velocity))
        assert torch.equal(param, torch.full((33,), position))


@pytest.mark.parametrize("name", NAMES)
def test_first_runs_of_single_parameters(name: str) -> None:
    """apex#1393: momentum was materialised for all parameters by the first step of any.

    A parameter whose first gradient comes late has its own first step, as in torch's for-loop.
    """
    theirs, mine = pair(name, "float64", lr=0.01, foreach=False)
    for opt in (theirs, mine):
        params = parameters_of(opt)
        for step in range(4):
            give_gradients(params, step)
            if step < 2:
                params[-1].grad = None
            opt.step()
            assert (params[-1] in opt.state) == (step >= 2) or name == "SGD"
    assert difference(theirs, mine) < 1e-9


def test_one_gradient_that_is_not_finite_does_not_spoil_all() -> None:
    """pytorch#46849: a clip with an infinite norm makes NaN of every gradient, without a word.

    `clip_grad_norm_(error_if_nonfinite=True)` raises; here the step names the gradient.
    """
    params = parameters([(3,), (4,), (5,)])
    give_gradients(params, 0)
    params[1].grad[2] = float("nan")
    opt = ours.SGD(params, lr=0.1, grad_clip_norm=1.0, on_nonfinite="raise")
    values = [p.detach().clone() for p in params]
    with pytest.raises(
        FloatingPointError, match=r"^param_groups\[0\]\['params'\]\[1\]\.grad holds inf or NaN"
    ):
        opt.step()
    assert all(torch.equal(p, v) for p, v in zip(params, values, strict=True))
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    assert all(p.grad.isnan().all() for p in params)


def test_norm_of_float16_gradients_does_not_overflow() -> None:
    """burn#5699: squares of float16 numbers beyond 256 are infinite in float16."""
    param = torch.nn.Parameter(torch.zeros(4, dtype=torch.float16))
    param.grad = torch.full((4,), 60000.0, dtype=torch.float16)
    value = param.grad[0].item()
    opt = ours.SGD([param], lr=1.0, grad_clip_norm=2.0)
    opt.step()
    assert opt.last.grad_norm == 2 * value
    assert torch.equal(param, torch.full((4,), -1.0, dtype=torch.float16))


def test_vector_body_and_tail_have_the_same_bits() -> None:
    """Paddle#21270: one buffer of all elements gave other bits than each tensor for itself.

    So does torch.optim.SGD(fused=True) against its own for-loop on some machines.
    """
    whole = torch.nn.Parameter(torch.randn(1031, generator=torch.Generator().manual_seed(1)))
    parts = [torch.nn.Parameter(p.clone()) for p in whole.detach().split(7)]
    opts = [ours.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1) for p in ([whole], parts)]
    for step in range(3):
        give_gradients([whole], step)
        for part, grad in zip(parts, whole.grad.split(7), strict=True):
            part.grad = grad
        for opt in opts:
            opt.step()
    assert torch.equal(whole, torch.cat(parts))


def test_state_of_bfloat16_parameters_survives_a_checkpoint() -> None:
    """torch's load_state_dict rounds a float32 state to its parameter's bfloat16."""
    states: list[Any] = []
    for module in (torch.optim, ours):
        param = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
        opt = module.SGD([param], lr=0.1, momentum=0.9)
        opt.state[param]["momentum_buffer"] = torch.full((4,), 1 / 3)
        opt.load_state_dict(opt.state_dict())
        states.append(opt.state[param]["momentum_buffer"])
    assert states[0].dtype == torch.bfloat16
    assert states[1].dtype == torch.float32
    assert torch.equal(states[1], torch.full((4,), 1 / 3))


def test_a_write_behind_the_back_of_autograd_is_no_secret() -> None:
    """Memory that is written through DLPack moves no counter; torch then computes a wrong gradient.

    The gradient of p * p at p = 1 is 2; after an unseen write of 100 torch says 200.
    """
    import numpy as np

    param = torch.nn.Parameter(torch.ones(3))
    loss = (param * param).sum()
    np.from_dlpack(param.detach())[...] = 100.0
    loss.backward()
    assert param.grad[0].item() == 200.0  # wrong, and silent

    param = torch.nn.Parameter(torch.ones(3))
    loss = (param * param).sum()
    param.grad = torch.ones(3)
    ours.SGD([param], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
