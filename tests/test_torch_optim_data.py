"""torch's own optimizer test data: its inputs, its error inputs, its schedulers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import hypothesis
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

STEPS = 10


@functools.cache
def optim_db() -> dict[str, Any]:
    """torch's `optim_db` by class name; importing it loads a profile of hypothesis."""
    profile = hypothesis.settings.get_current_profile_name()
    from torch.testing._internal.common_optimizers import optim_db as found

    hypothesis.settings.load_profile(profile)
    return {info.optim_cls.__name__: info for info in found}


def inputs(name: str) -> Iterator[dict[str, Any]]:
    """The arguments of each configuration; those of the GPU, too, whose flags do nothing here."""
    info = optim_db()[name]
    known = []
    for device in ("cpu", "mps", "cuda"):
        for given in info.optim_inputs_func(device=device):
            kwargs = {k: _wide(v) for k, v in given.kwargs.items() if k != "capturable"}
            if repr(kwargs) not in known:
                known.append(repr(kwargs))
                yield kwargs


def _wide(value: Any) -> Any:
    """With a float32 tensor for lr, torch would round its step sizes to float32."""
    if isinstance(value, tuple):
        return tuple(map(_wide, value))
    return value.double() if isinstance(value, torch.Tensor) else value


# --- inputs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_inputs_in_float64(name: str) -> None:
    """Every configuration, against the for-loop, to 1e-9 (torch keeps counts in float32)."""
    for kwargs in inputs(name):
        theirs, mine = pair(name, "float64", foreach=False, **kwargs)
        run(theirs, STEPS)
        run(mine, STEPS)
        assert difference(theirs, mine) < 1e-9, kwargs
        for p, q in zip(parameters_of(theirs), parameters_of(mine), strict=True):
            assert theirs.state[p].keys() == mine.state[q].keys(), kwargs
            for key, value in theirs.state[p].items():
                assert (value - mine.state[q][key]).abs().sum() < 1e-9 * max(1, p.numel()), key


@pytest.mark.parametrize("foreach", [False, True], ids=["for-loop", "foreach"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_inputs_of_sgd_have_equal_bits(dtype: str, foreach: bool) -> None:
    for kwargs in inputs("SGD"):
        theirs, mine = pair("SGD", dtype, foreach=foreach, **kwargs)
        run(theirs, STEPS)
        run(mine, STEPS)
        assert equal(theirs, mine), kwargs
        for p, q in zip(parameters_of(theirs), parameters_of(mine), strict=True):
            assert theirs.state[p].keys() == mine.state[q].keys()
            for key, value in theirs.state[p].items():
                assert torch.equal(value, mine.state[q][key]), kwargs


@pytest.mark.parametrize("name", NAMES)
def test_inputs_with_complex_parameters(name: str) -> None:
    """complex128: real and imaginary parts are updated as torch updates them.

    Not to the bit with SGD: torch multiplies by a complex number there.
    """
    for kwargs in inputs(name):
        shapes = [(2, 3), (33,)]
        twins = []
        for module in (torch.optim, ours):
            values = [p.detach() + 0.5j * p.detach() for p in parameters(shapes, "float64")]
            params = [torch.nn.Parameter(value) for value in values]
            twins.append(getattr(module, name)(params, **copy.deepcopy(kwargs)))
        for optimizer in twins:
            run(optimizer, 4)
        theirs, mine = twins
        assert difference(theirs, mine) < 1e-9, kwargs
        for p, q in zip(parameters_of(theirs), parameters_of(mine), strict=True):
            for key, value in theirs.state[p].items():
                assert value.dtype == mine.state[q][key].dtype or key == "mu_product"
                assert (value - mine.state[q][key]).abs().sum() < 1e-8, key


@pytest.mark.parametrize("name", NAMES)
def test_inputs_with_strided_parameters(name: str) -> None:
    """`torch.randn(10, 5, 2)[..., 0]`, as torch tests it; its neighbours stay as they are."""
    for kwargs in inputs(name):
        twins, bases = [], []
        for module in (torch.optim, ours):
            torch.manual_seed(3)
            base = torch.randn(10, 5, 2, dtype=torch.float64)
            bases.append(base)
            param = torch.nn.Parameter(base[..., 0])
            assert not param.is_contiguous()
            twins.append(getattr(module, name)([param], **copy.deepcopy(kwargs)))
        before = bases[1].clone()
        for optimizer in twins:
            run(optimizer, 4)
        assert difference(*twins) < 1e-9, kwargs
        assert torch.equal(bases[1][..., 1], before[..., 1])
        assert not torch.equal(bases[1][..., 0], before[..., 0])


@pytest.mark.parametrize("name", NAMES)
def test_param_groups_with_options_of_their_own(name: str) -> None:
    """As torch's `test_param_groups_lr` and `_weight_decay`, and all other inputs as options."""
    twins = []
    for module in (torch.optim, ours):
        params = parameters([(4, 3), (7,), (33,)], "float64")
        groups = [{"params": [params[0]], "lr": 0.02, "weight_decay": 0.3}, {"params": params[1:]}]
        twins.append(getattr(module, name)(groups, lr=0.01))
    for optimizer in twins:
        run(optimizer, STEPS)
    assert difference(*twins) < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_gradients_that_come_and_go(name: str) -> None:
    """Each parameter counts its own steps."""
    theirs, mine = pair(name, "float64", [(3,), (4,), (5,)])
    for step in range(6):
        for optimizer in (theirs, mine):
            params = parameters_of(optimizer)
            give_gradients(params, step)
            for k, param in enumerate(params):
                if (step + k) % 3 == 0:
                    param.grad = None
            optimizer.step()
    assert difference(theirs, mine) < 1e-9


# --- error inputs -----------------------------------------------------------------------------

# Limits of torch's implementations, which ours does not share: a tensor lr beside foreach=True
# (ours has one implementation), and betas of which only one is a tensor.
TAKEN_HERE = (
    "lr as Tensor doesn't work with foreach & not capturable",
    "betas must be either both floats or both Tensors",
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True",
)


@pytest.mark.parametrize("name", NAMES)
def test_error_inputs(name: str) -> None:
    """The same kind of exception, at construction, as torch asks for."""
    info = optim_db()[name]
    seen = 0
    for error in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        given = error.optimizer_error_input
        params = parameters([(1,)]) if given.params is None else given.params
        if given.desc in TAKEN_HERE:
            continue
        if error.error_type is UserWarning:
            with pytest.warns(UserWarning, match=error.error_regex):
                getattr(ours, name)(params, **given.kwargs)
        else:
            with pytest.raises(error.error_type):
                getattr(ours, name)(params, **given.kwargs)
        seen += 1
    assert seen >= 7


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_error_inputs_that_are_limits_of_torch(name: str) -> None:
    """What ours takes instead of refusing gives the result of plain numbers."""
    info = optim_db()[name]
    taken = 0
    for error in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        given = error.optimizer_error_input
        if given.desc in TAKEN_HERE:
            mine = getattr(ours, name)(parameters([(7,)]), **given.kwargs)
            plain = {k: v for k, v in given.kwargs.items() if k != "foreach"}
            plain["lr"] = float(plain["lr"])
            plain["betas"] = tuple(map(float, plain.get("betas", (0.9, 0.999))))
            other = getattr(ours, name)(parameters([(7,)]), **plain)
            run(mine, 3)
            run(other, 3)
            assert equal(mine, other), given.desc
            taken += 1
    assert taken == 4


# --- schedulers of torch's data ---------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_scheduler_inputs(name: str) -> None:
    """torch's sets of schedulers, stepped together."""
    for makers in optim_db()[name].scheduler_inputs:
        theirs, mine = pair(name, "float64", [(4, 3), (33,)], lr=0.01)
        for optimizer in (theirs, mine):
            schedulers = [make(optimizer) for make in makers]
            for step in range(12):
                run(optimizer, 1, step)
                for scheduler in schedulers:
                    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
                    if isinstance(scheduler, plateau):
                        scheduler.step(1.0)
                    else:
                        scheduler.step()
        assert theirs.param_groups[0]["lr"] == mine.param_groups[0]["lr"]
        assert difference(theirs, mine) < 1e-9
        if name == "SGD":
            assert equal(theirs, mine)
