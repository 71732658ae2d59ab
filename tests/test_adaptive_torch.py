"""PyTorch's own NAdam, Adam, AdamW and RMSprop in float64, and accumulation from its `.grad`."""

from __future__ import annotations

import copy
from typing import Any

import fusedstep as fs
import numpy as np
import objects
import papers
import pytest

try:
    import torch
except ImportError:  # the marker leaves the tests out, by name
    torch = None

pytestmark = pytest.mark.framework("torch")

STEPS, SIZES = 100, (1, 17, 200)
# Forms of ours that PyTorch does not have.
OURS = ("decoupled", "nesterov", "nesterov next momentum", "nesterov all")
PAIRS = [(kind, case) for kind, case in papers.PAIRS if case not in OURS or kind is fs.NAdam]
PAIRS += [(fs.Adam, "decoupled")]


def run(make: Any, options: dict[str, Any], *, mine: bool, steps: int = STEPS) -> tuple[Any, Any]:
    """The optimizer and its parameters after all steps, each array without some gradients."""
    params = [torch.nn.Parameter(torch.from_numpy(x)) for x in objects.arrays(0, float, SIZES)]
    opt = make(params, **options) if mine else make(params, foreach=False, **options)
    for t in range(steps):
        for k, (p, g) in enumerate(zip(params, objects.arrays(t + 1, float, SIZES), strict=True)):
            p.grad = None if k and t % 7 == k else torch.from_numpy(g)
        opt.step()
    return opt, params


def close(ours: Any, theirs: Any) -> bool:
    """Relative to the largest element."""
    return bool((ours - theirs).abs().max() <= 1e-9 * theirs.abs().max())


@pytest.mark.parametrize(
    ("kind", "case"), PAIRS, ids=[f"{kind.__name__}-{case}" for kind, case in PAIRS]
)
def test_close_to_torch(kind: type[fs.Optimizer], case: str) -> None:
    """Parameters and state, to 1e-9: PyTorch keeps counts and products in float32."""
    options = papers.CASES[kind][case]
    theirs = dict(options)
    name = kind.__name__
    if kind is fs.Adam and theirs.pop("decoupled_weight_decay", False):
        name = "AdamW"
    oracle, expected = run(getattr(torch.optim, name), theirs, mine=False)
    opt, params = run(kind, options, mine=True)
    assert close(torch.cat(params), torch.cat(expected))
    for q, entry in zip(expected, opt.state_dict()["state"].values(), strict=True):
        state = oracle.state[q]
        assert entry["step"] == state["step"]
        for slot, buffer in entry.items():
            if isinstance(buffer, torch.Tensor):
                theirs_too = slot if slot in state else f"{slot}s"  # max_exp_avg_sqs
                assert close(buffer, state[theirs_too]), slot


def test_defaults_are_those_of_torch() -> None:
    p = [torch.nn.Parameter(torch.ones(1))]
    for kind in papers.FORMULAS:
        theirs, ours = getattr(torch.optim, kind.__name__)(p).defaults, kind(p).defaults
        shared = ours.keys() & theirs.keys() - {"decoupled_weight_decay"}
        assert len(shared) >= 5
        assert {name: theirs[name] for name in shared} == {name: ours[name] for name in shared}


def test_centered_rmsprop_where_torch_has_nan() -> None:
    """A constant gradient: what rounding leaves of the variance is negative there."""
    g = torch.from_numpy(np.random.default_rng(0).uniform(0.1, 3, 2000).astype(np.float32))
    results = []
    for make in (torch.optim.RMSprop, fs.RMSprop):
        p = torch.nn.Parameter(torch.zeros(2000))
        opt = make([p], lr=1e-3, alpha=0.9, eps=1e-4, centered=True)
        for _ in range(500):
            p.grad = g.clone()
            opt.step()
        results.append(p.detach())
    theirs, ours = results
    assert theirs.isnan().any()
    assert ours.isfinite().all()
    assert (ours < 0).all()


# --- state of torch's runs ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(papers.FORMULAS), ids=lambda k: k.__name__)
def test_going_on_with_the_state_of_torch(kind: type[fs.Optimizer]) -> None:
    """The names are the same, so a run can change over by `set_state`."""
    options = {fs.Adam: {"amsgrad": True}, fs.RMSprop: {"centered": True, "momentum": 0.9}}
    given = options.get(kind, {})
    make = getattr(torch.optim, kind.__name__)
    p = torch.nn.Parameter(torch.linspace(-1, 1, 50, dtype=torch.float64))
    oracle = make([p], **given)

    def steps(opt: Any, parameter: Any, first: int) -> None:
        for t in range(first, first + 20):
            parameter.grad = torch.sin(torch.arange(50.0, dtype=torch.float64) * t) + parameter.data
            opt.step()

    steps(oracle, p, 0)
    q = copy.deepcopy(p)
    opt, state = kind([q], **given), dict(oracle.state[p])
    scalars = {"step": int(state.pop("step"))}
    if "mu_product" in state:
        scalars["mu_product"] = float(state.pop("mu_product"))
    buffers = {name.replace("_sqs", "_sq"): [buffer] for name, buffer in state.items()}
    opt.set_state(**scalars, **buffers)
    steps(oracle, p, 20)
    steps(opt, q, 20)
    assert close(q, p)


# --- accumulation -------------------------------------------------------------------------------


def test_accumulating_the_gradients_of_a_module() -> None:
    """Micro-batches of a mean loss, scaled, against torch's own accumulation in `.grad`."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    model = model.double()
    twin = copy.deepcopy(model)
    x = torch.randn(12, 5, dtype=torch.float64)
    opt = fs.AdamW(model.parameters(), lr=0.01, grad_clip_norm=0.1)
    oracle = torch.optim.AdamW(twin.parameters(), lr=0.01)
    for _ in range(5):
        for part in x.split(4):
            model.zero_grad()
            model(part).square().mean().backward()
            opt.accumulate(scale=1 / 3)
        result = opt.step()
        oracle.zero_grad()
        for part in x.split(4):
            (twin(part).square().mean() / 3).backward()
        norm = torch.cat([q.grad.flatten() for q in twin.parameters()]).norm()
        for q in twin.parameters():
            q.grad *= min(1, 0.1 / norm)  # clip_grad_norm_ would add 1e-6 to the norm
        oracle.step()
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-9)
        assert result.clip_coef < 1
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert close(p, q)


def test_sums_are_tensors_without_a_graph() -> None:
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    version = p._version
    opt = fs.SGD([p], lr=1.0)
    for _ in range(256):
        p.grad = torch.full((3,), 2.0**-9, dtype=torch.bfloat16)
        opt.accumulate()
    assert p._version == version
    opt.step()
    assert p._version > version
    assert p.tolist() == [-0.5] * 3
    assert p.grad[0].item() == 2.0**-9
