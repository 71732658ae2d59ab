"""Every learning rate scheduler of torch, against the same one on the class of torch."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
from torch_twins import difference, equal, ours, pair, parameters, parameters_of, run, torch

pytestmark = pytest.mark.framework("torch")

SHAPES = [(4, 3), (33,)]
STEPS = 12


def schedulers() -> Any:
    return torch.optim.lr_scheduler


def sequential(opt: Any) -> Any:
    s = schedulers()
    parts = [s.LinearLR(opt, 0.2, total_iters=3), s.CosineAnnealingLR(opt, 8)]
    return s.SequentialLR(opt, parts, milestones=[3])


def chained(opt: Any) -> Any:
    s = schedulers()
    return s.ChainedScheduler([s.ConstantLR(opt, 0.5, 4), s.ExponentialLR(opt, 0.9)], opt)


# By the name of the class; None where the class is used by another one only.
MAKERS: dict[str, Callable[[Any], Any] | None] = {
    "LRScheduler": None,
    "LambdaLR": lambda o: schedulers().LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: schedulers().MultiplicativeLR(o, lambda t: 1 - t / 50),
    "StepLR": lambda o: schedulers().StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: schedulers().MultiStepLR(o, [2, 5, 7], 0.5),
    "ConstantLR": lambda o: schedulers().ConstantLR(o, 0.3, 4),
    "LinearLR": lambda o: schedulers().LinearLR(o, 0.1, 0.9, 6),
    "ExponentialLR": lambda o: schedulers().ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: schedulers().PolynomialLR(o, 9, 2.0),
    "CosineAnnealingLR": lambda o: schedulers().CosineAnnealingLR(o, 7, 1e-4),
    "CosineAnnealingWarmRestarts": lambda o: schedulers().CosineAnnealingWarmRestarts(o, 3, 2),
    "CyclicLR": lambda o: schedulers().CyclicLR(o, 0.001, 0.1, 4, mode="triangular2"),
    "OneCycleLR": lambda o: schedulers().OneCycleLR(o, 0.1, total_steps=STEPS + 2),
    "ReduceLROnPlateau": lambda o: schedulers().ReduceLROnPlateau(o, patience=1, factor=0.3),
    "SequentialLR": sequential,
    "ChainedScheduler": chained,
}


def test_no_scheduler_is_missing() -> None:
    assert set(schedulers().__all__) == set(MAKERS)


def advance(scheduler: Any, step: int) -> None:
    if isinstance(scheduler, schedulers().ReduceLROnPlateau):
        scheduler.step(1.0 + step // 4)
    else:
        scheduler.step()


def run_with(optimizer: Any, maker: Callable[[Any], Any], steps: int = STEPS) -> list[Any]:
    """What the scheduler set, step by step."""
    scheduler, seen = maker(optimizer), []
    for step in range(steps):
        run(optimizer, 1, step)
        advance(scheduler, step)
        keys = ("lr", "momentum", "betas")
        seen.append([{k: g[k] for k in keys if k in g} for g in optimizer.param_groups])
    return seen


@pytest.mark.parametrize("kind", [kind for kind, maker in MAKERS.items() if maker])
def test_sgd_with_a_scheduler(kind: str) -> None:
    """Equal bits with torch.optim.SGD; OneCycle and Cyclic drive the momentum, too."""
    kwargs = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    theirs, mine = pair("SGD", shapes=SHAPES, **kwargs)
    seen = [run_with(opt, MAKERS[kind]) for opt in (theirs, mine)]
    assert seen[0] == seen[1]
    assert len({step[0]["lr"] for step in seen[1]}) > 1
    if kind in {"OneCycleLR", "CyclicLR"}:
        assert len({step[0]["momentum"] for step in seen[1]}) > 1
    assert equal(theirs, mine)


@pytest.mark.parametrize("kind", ["OneCycleLR", "CyclicLR", "CosineAnnealingLR", "StepLR"])
@pytest.mark.parametrize("name", ["Adam", "AdamW", "NAdam", "RMSprop"])
def test_adaptive_classes_with_a_scheduler(name: str, kind: str) -> None:
    """Where there are betas, the first of them is the momentum that is driven."""
    kwargs = {"lr": 0.01, **({"momentum": 0.5} if name == "RMSprop" else {})}
    theirs, mine = pair(name, "float64", SHAPES, **kwargs)
    seen = [run_with(opt, MAKERS[kind]) for opt in (theirs, mine)]
    assert seen[0] == seen[1]
    if "Cyc" in kind:
        driven = "momentum" if name == "RMSprop" else "betas"
        assert len({repr(step[0][driven]) for step in seen[1]}) > 1
    # NAdam: torch multiplies its product in float32
    assert difference(theirs, mine) < (1e-8 if name == "NAdam" else 1e-9)


def test_momentum_that_is_cycled_in_the_other_classes() -> None:
    """Momentum and MomentumNesterov are torch.optim.SGD in this, to the bit."""
    for name, nesterov in (("Momentum", False), ("MomentumNesterov", True)):
        mine = getattr(ours, name)(parameters(SHAPES), lr=0.1)
        theirs = torch.optim.SGD(parameters(SHAPES), lr=0.1, momentum=0.9, nesterov=nesterov)
        seen = [run_with(opt, MAKERS["OneCycleLR"]) for opt in (theirs, mine)]
        assert seen[0] == seen[1]
        assert equal(theirs, mine)


@pytest.mark.parametrize("kind", ["LambdaLR", "OneCycleLR", "SequentialLR", "ReduceLROnPlateau"])
def test_groups_with_rates_of_their_own(kind: str) -> None:
    twins = []
    for module in (torch.optim, ours):
        params = parameters([(4, 3), (33,), (7,)])
        groups = [{"params": params[:1], "lr": 0.5}, {"params": params[1:]}]
        opt = module.SGD(groups, lr=0.1, momentum=0.9)
        seen = run_with(opt, MAKERS[kind])
        twins.append((opt, seen))
    assert twins[0][1] == twins[1][1]
    assert equal(twins[0][0], twins[1][0])


@pytest.mark.parametrize("kind", ["StepLR", "ExponentialLR", "CosineAnnealingLR", "LinearLR"])
def test_tensor_lr(kind: str) -> None:
    """A scheduler fills a tensor in place; it is read at every step."""
    rates = [torch.tensor(0.1, dtype=torch.float64) for _ in range(2)]
    twins = [
        module.SGD(parameters(SHAPES), lr=lr, momentum=0.9)
        for module, lr in zip((torch.optim, ours), rates, strict=True)
    ]
    for opt in twins:
        run_with(opt, MAKERS[kind])
    # Which tensor stands in the group and is written is torch's affair: the same on both sides.
    theirs, mine = (opt.param_groups[0]["lr"] for opt in twins)
    assert isinstance(mine, torch.Tensor)
    assert theirs.item() == mine.item()
    assert theirs.item() != 0.1
    assert equal(*twins)


def test_tensor_lr_that_is_filled_by_hand() -> None:
    """Of one element in any shape, and of any float dtype."""
    for lr in (torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([[0.5]]).double()):
        opt = ours.SGD(parameters(SHAPES), lr=lr)
        plain = ours.SGD(parameters(SHAPES), lr=0.5)
        for rate in (0.5, 0.25):
            lr.fill_(rate)
            plain.param_groups[0]["lr"] = rate
            run(opt, 1)
            run(plain, 1)
        assert equal(opt, plain)


def test_tensor_betas() -> None:
    betas = torch.tensor(0.5), torch.tensor(0.75)
    opt = ours.Adam(parameters(SHAPES), lr=torch.tensor(0.5), betas=betas)
    plain = ours.Adam(parameters(SHAPES), lr=0.5, betas=(0.5, 0.75))
    run(opt, 3)
    run(plain, 3)
    assert equal(opt, plain)
    fresh = ours.Adam(parameters(SHAPES))
    fresh.load_state_dict(opt.state_dict())
    assert fresh.param_groups[0]["betas"] == betas


@pytest.mark.parametrize("kind", [kind for kind, maker in MAKERS.items() if maker])
def test_resume_with_the_scheduler(kind: str) -> None:
    """Optimizer and scheduler saved and loaded, as torch's documentation says."""
    maker = MAKERS[kind]
    assert maker is not None
    whole = ours.SGD(parameters(SHAPES), lr=0.1, momentum=0.9)
    scheduler = maker(whole)
    for step in range(STEPS):
        if step == 5:
            saved = copy.deepcopy((whole.state_dict(), scheduler.state_dict()))
            values = [p.detach().clone() for p in parameters_of(whole)]
        run(whole, 1, step)
        advance(scheduler, step)
    resumed = ours.SGD([torch.nn.Parameter(v) for v in values], lr=0.1, momentum=0.9)
    again = maker(resumed)
    again.load_state_dict(saved[1])
    resumed.load_state_dict(saved[0])
    for step in range(5, STEPS):
        run(resumed, 1, step)
        advance(again, step)
    assert equal(whole, resumed)


def test_no_warning_about_the_order_of_calls() -> None:
    """Schedulers wrap `step` to see that it is called before theirs; warnings are errors here."""
    opt = ours.SGD(parameters(SHAPES), lr=0.1)
    scheduler = schedulers().StepLR(opt, 1)
    run(opt, 1)
    scheduler.step()
    other = ours.SGD(parameters(SHAPES), lr=0.1)
    late = schedulers().StepLR(other, 1)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        late.step()
    assert inspect.ismethod(ours.SGD(parameters(SHAPES)).step)


def test_swa_and_averaged_models() -> None:
    """`SWALR` and `AveragedModel` see what the step writes."""
    from torch.optim.swa_utils import SWALR, AveragedModel

    models, averages = [], []
    for module in (torch.optim, ours):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        average = AveragedModel(model)
        opt = module.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = SWALR(opt, swa_lr=0.02, anneal_epochs=3)
        for step in range(5):
            run(opt, 1, step)
            scheduler.step()
            average.update_parameters(model)
        models.append(model)
        averages.append(average.module)
    for first, second in (models, averages):
        for p, q in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.equal(p, q)
