"""What a plan remembers of its arrays between steps, and when it must not trust that."""

from __future__ import annotations

from typing import Any

import fusedstep as fs
import numpy as np
import pytest

try:
    import torch
except ImportError:  # the marker leaves the tests out, by name
    torch = None

SIZES = (1, 7, 4099)


def values(seed: int) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(n).astype(np.float32) for n in SIZES]


def velocities(optimizer: fs.Optimizer) -> list[Any]:
    return [each["velocity"] for each in optimizer.state_dict()["state"].values()]


def test_states_of_a_skipped_first_step_are_forgotten() -> None:
    """They were made, and dropped with the step: their memory is somebody else's by now."""
    params, twins = values(0), values(0)
    optimizer = fs.Momentum(params, lr=0.1, on_nonfinite="skip")
    bad = [np.full_like(p, np.nan) for p in params]
    occupied = []
    for _ in range(3):
        assert optimizer.step(bad).skipped
        occupied += [np.full_like(p, 7.0) for p in params]  # where the states may have been
    other = fs.Momentum(twins, lr=0.1)
    for seed in range(1, 4):
        optimizer.step(values(seed))
        other.step(values(seed))
    assert all(p.tobytes() == q.tobytes() for p, q in zip(params, twins, strict=True))
    assert all(np.all(o == 7.0) for o in occupied)


def test_forms_with_different_states_by_turns() -> None:
    """The second state of one rule of RMSprop is another one in the next."""
    params, expected = values(0), values(0)
    optimizer = fs.RMSprop(params, lr=0.01, momentum=0.5, centered=True)
    state: dict[str, Any] = {}
    for t in range(6):
        momentum, centered = (0.5, True) if t % 2 == 0 else (0.5, False)
        optimizer.param_groups[0]["centered"] = centered
        optimizer.step(values(t + 1))
        kept = {name: trees for name, trees in state.items() if name != "grad_avg" or centered}
        result = fs.fused_rmsprop_step(
            expected, values(t + 1), **kept, lr=0.01, momentum=momentum, centered=centered
        )
        state |= result.state
    assert all(p.tobytes() == q.tobytes() for p, q in zip(params, expected, strict=True))


@pytest.mark.framework("torch")
def test_memory_given_to_a_state_that_is_held_is_used() -> None:
    params = [torch.nn.Parameter(torch.from_numpy(p)) for p in values(0)]
    optimizer = fs.Momentum(params, lr=0.1, momentum=0.5)
    grads = [torch.from_numpy(g) for g in values(1)]
    for _ in range(3):
        optimizer.step(grads)
    held = velocities(optimizer)
    before = [p.detach().clone() for p in params]
    for velocity in held:
        velocity.data = torch.full_like(velocity, 4.0)
    optimizer.step(grads)
    for p, q, g, velocity in zip(params, before, grads, held, strict=True):
        assert torch.equal(velocity, 2.0 + g)
        fs.fused_sgd_step(q, velocity, lr=0.1)
        assert torch.equal(p, q)


@pytest.mark.framework("torch")
def test_autograd_is_told_of_states_that_somebody_holds() -> None:
    params = [torch.nn.Parameter(torch.from_numpy(p)) for p in values(0)]
    optimizer = fs.Momentum(params, lr=0.1)
    grads = [torch.from_numpy(g) for g in values(1)]
    for _ in range(3):
        optimizer.step(grads)
    held = velocities(optimizer)
    versions = [velocity._version for velocity in held]
    optimizer.step(grads)
    assert [velocity._version for velocity in held] == [v + 1 for v in versions]


@pytest.mark.framework("torch")
@pytest.mark.parametrize(
    "change",
    {
        "strides": lambda p: p.to(memory_format=torch.channels_last),
        "shape": lambda p: p.reshape(2, -1),
        "dtype": lambda p: p.double(),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_parameter_of_another_form_is_noticed(change: tuple[str, Any]) -> None:
    """As `module.to()` gives it: same object, other memory; its velocity does not fit any more."""
    weight = torch.nn.Parameter(torch.randn(2, 3, 4, 5))
    optimizer = fs.Momentum([weight], lr=0.1)
    for _ in range(3):
        optimizer.step([torch.randn_like(weight)])
    weight.data = change[1](weight.data)
    before = weight.detach().clone()
    with pytest.raises((TypeError, ValueError), match="velocity"):
        optimizer.step([torch.randn_like(weight)])
    assert torch.equal(weight, before)


@pytest.mark.framework("torch")
def test_a_parameter_that_becomes_lazily_negated_is_refused() -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = fs.SGD([weight], lr=0.1)
    optimizer.step([torch.ones(4)])
    weight.data = torch._neg_view(torch.ones(4))
    with pytest.raises(BufferError, match="negated"):
        optimizer.step([torch.ones(4)])


@pytest.mark.framework("torch")
@pytest.mark.parametrize("held", [False, True])
def test_states_that_somebody_moved(held: bool) -> None:
    """A state is given other memory by who got it, or held it over a step, and let go of it."""
    param = torch.zeros(5000)
    optimizer = fs.Momentum([param], lr=1.0, momentum=0.5)
    for _ in range(3):
        optimizer.step([torch.ones(5000)])
    velocity = optimizer.state_dict()["state"][0]["velocity"]
    if held:
        optimizer.step([torch.ones(5000)])
    value = velocity[0].item()
    velocity.share_memory_()
    del velocity
    for _ in range(2):
        value = 0.5 * value + 1.0
        optimizer.step([torch.ones(5000)])
        assert torch.equal(velocities(optimizer)[0], torch.full((5000,), value))
