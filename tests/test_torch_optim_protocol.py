"""What torch expects of an optimizer: signatures, groups, hooks, copies, pickles, closures."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import math
import pickle
from typing import Any

import fusedstep
import pytest
from torch_twins import (
    FORMS,
    NAMES,
    equal,
    give_gradients,
    ours,
    pair,
    parameters,
    parameters_of,
    run,
    same_state,
    snapshot,
    torch,
    unchanged,
)

pytestmark = pytest.mark.framework("torch")

SHAPES = [(4, 3), (7,), ()]


def make(name: str, shapes: Any = SHAPES, **kwargs: Any) -> Any:
    return getattr(ours, name)(parameters(shapes), **{**FORMS[name][1], **kwargs})


# --- signatures -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_signature_is_that_of_torch(name: str) -> None:
    """Positional arguments in torch's order; all of torch's arguments with torch's defaults."""
    theirs = inspect.signature(getattr(torch.optim, name)).parameters
    mine = inspect.signature(getattr(ours, name)).parameters
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD

    def in_order(parameters: Any) -> list[str]:
        return [n for n, p in parameters.items() if p.kind is positional]

    assert in_order(mine) == in_order(theirs)
    for argument, parameter in theirs.items():
        assert mine[argument].default == parameter.default, argument
        assert mine[argument].kind is parameter.kind, argument
    added = {"grad_clip_norm", "grad_clip_value", "on_nonfinite", "master_weights"}
    assert added <= mine.keys()
    assert all(mine[n].kind is inspect.Parameter.KEYWORD_ONLY for n in mine if n not in theirs)


@pytest.mark.parametrize("name", ["Momentum", "MomentumNesterov"])
def test_signature_of_the_other_classes(name: str) -> None:
    """Those of the classes of the core, which torch does not have."""
    core = inspect.signature(getattr(fusedstep, name)).parameters
    mine = inspect.signature(getattr(ours, name)).parameters
    assert list(mine)[:3] == ["params", "lr", "momentum"]
    assert all(mine[n].default == p.default for n, p in core.items() if n != "params")


@pytest.mark.parametrize("name", FORMS)
def test_positional_arguments(name: str) -> None:
    """Defaults given by position, in torch's order, mean what they mean by name."""
    signature = inspect.signature(getattr(ours, name))
    first = [
        p.default
        for p in signature.parameters.values()
        if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and p.name != "params"
    ]
    by_position, by_name = (
        getattr(ours, name)(parameters(), *first),
        getattr(ours, name)(parameters()),
    )
    for key, value in by_name.param_groups[0].items():
        assert key == "params" or by_position.param_groups[0][key] == value


@pytest.mark.parametrize("name", FORMS)
def test_wrong_arguments_name_the_class(name: str) -> None:
    kind = getattr(ours, name)
    with pytest.raises(TypeError, match=rf"^{name}: .*'learning_rate'"):
        kind(parameters(), learning_rate=0.1)
    with pytest.raises(TypeError, match=rf"^{name}: .*'params'"):
        kind()
    with pytest.raises(TypeError, match=rf"^{name}: .*too many positional"):
        kind(parameters(), *[0.1] * 12)


def test_the_base_is_no_optimizer() -> None:
    with pytest.raises(TypeError, match="base of the optimizers"):
        ours.Optimizer._set_up(object.__new__(ours.Optimizer), parameters(), {}, {})


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"lr": -1.0}, ValueError, "lr"),
        ({"lr": float("nan")}, ValueError, "lr"),
        ({"lr": "fast"}, TypeError, "lr"),
        ({"lr": math.cos}, TypeError, "lr.*scheduler of torch.optim.lr_scheduler"),
        ({"momentum": 1.0}, ValueError, "momentum"),
        ({"nesterov": True}, ValueError, "nesterov"),
        ({"grad_clip_norm": 0.0}, ValueError, "grad_clip_norm"),
        ({"grad_clip_value": -1.0}, ValueError, "grad_clip_value"),
        ({"on_nonfinite": "ignore"}, ValueError, "on_nonfinite"),
        ({"grad_clip_scope": "tensor"}, ValueError, "grad_clip_scope"),
        ({"skip_grad_norm": 0.0}, ValueError, "skip_grad_norm"),
        ({"differentiable": True}, ValueError, "differentiable.*torch.optim"),
        ({"maximize": 2}, ValueError, "maximize"),
        ({"foreach": "yes"}, TypeError, "foreach"),
    ],
)
def test_refused_values(kwargs: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        ours.SGD(parameters(), **kwargs)


@pytest.mark.parametrize("name", FORMS)
def test_switches_have_no_effect(name: str) -> None:
    known = inspect.signature(getattr(ours, name)).parameters
    flags = [flag for flag in ("foreach", "fused", "capturable") if flag in known]
    assert flags
    for flag in flags:
        plain, switched = make(name), make(name, **{flag: True})
        assert switched.param_groups[0][flag] is True
        run(plain, 2)
        run(switched, 2)
        assert equal(plain, switched)


# --- groups -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_defaults_and_groups_hold_what_torch_has(name: str) -> None:
    theirs, mine = pair(name)
    for key, value in theirs.defaults.items():
        assert mine.defaults[key] == value, key
        assert mine.param_groups[0][key] == value, key
    assert isinstance(mine, torch.optim.Optimizer)
    assert repr(mine).startswith(f"{name} (\nParameter Group 0\n")


def test_keys_of_the_user_stay() -> None:
    """Groups and defaults may hold keys that are none of ours."""
    params = parameters()
    opt = ours.SGD([{"params": params, "name": "all", "initial_lr": 0.3}], lr=0.1)
    run(opt, 1)
    assert opt.state_dict()["param_groups"][0]["name"] == "all"
    fresh = ours.SGD(parameters(), lr=0.2)
    fresh.load_state_dict(opt.state_dict())
    assert fresh.param_groups[0]["name"] == "all"
    assert fresh.param_groups[0]["lr"] == 0.1


def test_add_param_group() -> None:
    """In the middle of a run, with options of its own; as torch.optim.SGD, to the bit."""
    twins = []
    for module in (torch.optim, ours):
        params = parameters([(4, 3), (7,), (33,)])
        opt = module.SGD(params[:1], lr=0.1, momentum=0.9)
        run(opt, 2)
        opt.add_param_group({"params": params[1], "lr": 0.3, "momentum": 0.5})
        run(opt, 2, 2)
        opt.add_param_group({"params": params[2:]})
        run(opt, 2, 4)
        twins.append(opt)
    assert equal(*twins)
    assert same_state(*(opt.state_dict() for opt in twins))
    assert len(twins[1].param_groups) == 3


def test_a_refused_group_changes_nothing() -> None:
    params = parameters([(4, 3), (7,)])
    opt = ours.SGD(params, lr=0.1, momentum=0.9)
    run(opt, 1)
    before = snapshot(opt)
    with pytest.raises(ValueError, match="more than one parameter group"):
        opt.add_param_group({"params": params[0]})
    with pytest.raises(TypeError, match="ordered collections"):
        opt.add_param_group({"params": set(parameters([(3,)]))})
    with pytest.raises(ValueError, match="non-leaf"):
        opt.add_param_group({"params": params[0] * 2})
    assert unchanged(opt, before)
    run(opt, 1, 1)
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("how", ["element", "list", "group", "append", "remove"])
def test_replaced_parameters_are_the_new_ones(how: str) -> None:
    """As programs that grow or prune a parameter do it; torch.optim.SGD gives the bits."""
    twins = []
    for module in (torch.optim, ours):
        params = parameters([(4, 3), (7,), (5,)])
        opt = module.SGD(params[:2], lr=0.1, momentum=0.9)
        run(opt, 2)
        group = opt.param_groups[0]
        if how == "element":  # the state moves to the new parameter, as when Gaussians are split
            state = opt.state.pop(params[0])
            opt.state[params[2]] = {"momentum_buffer": state["momentum_buffer"][0].new_ones(5)}
            group["params"][0] = params[2]
        elif how == "list":
            group["params"] = [params[2], params[1]]
        elif how == "group":
            opt.param_groups[:] = [{**group, "params": [params[2]], "lr": 0.5}]
        elif how == "append":
            group["params"].append(params[2])
        else:
            del group["params"][0]
        run(opt, 2, 2)
        twins.append((opt, params))
    (theirs, first), (mine, second) = twins
    for p, q in zip(first, second, strict=True):
        assert torch.equal(p, q)
        of_p, of_q = theirs.state.get(p, {}), mine.state.get(q, {})
        assert of_p.keys() == of_q.keys()
        assert all(torch.equal(value, of_q[key]) for key, value in of_p.items())


def test_message_names_the_group_that_is_out_of_range() -> None:
    params = parameters([(4, 3), (7,)])
    opt = ours.SGD([{"params": params[:1]}, {"params": params[1:]}], lr=0.1, momentum=0.9)
    run(opt, 1)
    before = snapshot(opt)
    for key, value, error in [
        ("lr", -0.1, ValueError),
        ("momentum", 1.5, ValueError),
        ("weight_decay", -1.0, ValueError),
        ("weight_decay", math.hypot, TypeError),
        ("grad_clip_norm", 0.0, ValueError),
        ("lr", math.cos, TypeError),
        ("lr", torch.ones(2), ValueError),
    ]:
        kept = opt.param_groups[1][key]
        opt.param_groups[1][key] = value
        with pytest.raises(error, match=rf"^param_groups\[1\]: {key}"):
            opt.step()
        opt.param_groups[1][key] = kept
    assert unchanged(opt, before)
    opt.step()


def test_groups_without_parameters() -> None:
    opt = ours.SGD([{"params": []}, {"params": parameters()}, {"params": []}], lr=0.1)
    plain = ours.SGD(parameters(), lr=0.1)
    run(opt, 2)
    run(plain, 2)
    assert equal(opt, plain)
    nothing = ours.Adam([{"params": []}])
    assert nothing.step() is None
    assert nothing.state_dict()["state"] == {}
    with pytest.raises(ValueError, match="empty parameter list"):
        ours.SGD([], lr=0.1)


@pytest.mark.parametrize("name", FORMS)
def test_no_gradients(name: str) -> None:
    """Nothing happens, and nothing is counted."""
    opt = make(name, grad_clip_norm=1.0, on_nonfinite="raise")
    before = snapshot(opt)
    assert opt.step() is None
    assert unchanged(opt, before)
    assert len(opt.state) == 0
    assert opt.last.grad_norm == 0.0
    assert opt.grad_norm.item() == 0.0


def test_zero_grad() -> None:
    opt = make("SGD")
    params = parameters_of(opt)
    give_gradients(params, 0)
    grads = [p.grad for p in params]
    opt.zero_grad(set_to_none=False)
    assert all(p.grad is g and not g.any() for p, g in zip(params, grads, strict=True))
    opt.zero_grad()
    assert all(p.grad is None for p in params)


# --- step and its hooks -----------------------------------------------------------------------


def test_step_is_a_bound_method() -> None:
    """Schedulers and profilers replace it on the object, by way of `__func__`."""
    opt = make("SGD")
    assert opt.step.__self__ is opt
    assert inspect.isfunction(opt.step.__func__)
    assert list(inspect.signature(opt.step).parameters) == ["closure"]
    assert opt.step.__func__ is not torch.optim.Optimizer.step


def test_closure() -> None:
    """Called once, with gradients enabled; its value is returned, and what it leaves is used."""
    params = parameters([(5,)])
    opt, calls = ours.SGD(params, lr=0.1), []

    def closure() -> Any:
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = params[0].square().sum()
        loss.backward()
        return loss

    before = params[0].detach().clone()
    with torch.no_grad():
        loss = opt.step(closure)
    assert calls == [True]
    assert loss.item() == before.square().sum().item()
    assert torch.equal(params[0], before - 0.1 * (2 * before))
    assert opt.step(closure=closure).item() < loss.item()
    assert not hasattr(opt, "closure")


def test_closure_that_raises() -> None:
    opt = make("Adam")
    give_gradients(parameters_of(opt), 0)
    before = snapshot(opt)

    def closure() -> Any:
        raise RuntimeError("no loss today")

    with pytest.raises(RuntimeError, match="no loss today"):
        opt.step(closure)
    assert unchanged(opt, before)


def test_step_hooks() -> None:
    """Of the object and of torch; before and after; a pre-hook may replace the arguments."""
    from torch.optim.optimizer import (
        register_optimizer_step_post_hook,
        register_optimizer_step_pre_hook,
    )

    opt, seen = make("SGD"), []
    loss = torch.ones(())

    def noting(name: str, *result: Any) -> Any:
        return lambda *_: seen.append(name) or (result or None)

    handles = [
        opt.register_step_pre_hook(noting("pre", (opt, lambda: loss), {})),
        opt.register_step_post_hook(noting("post")),
        register_optimizer_step_pre_hook(noting("global pre")),
        register_optimizer_step_post_hook(noting("global post")),
    ]
    assert opt.step() is loss
    assert seen == ["global pre", "pre", "post", "global post"]
    for handle in handles:
        handle.remove()
    assert opt.step() is None
    assert len(seen) == 4


def test_state_dict_hooks() -> None:
    """They see and replace what torch's hooks see; a dict of any form comes through."""
    opt = make("Adam")
    run(opt, 1)
    seen = []
    opt.register_state_dict_pre_hook(lambda o: seen.append(len(o.state)))
    opt.register_state_dict_post_hook(lambda _, d: seen.append(d["state"][0]["step"].item()))
    opt.register_state_dict_post_hook(lambda _, d: {"flat": [*d["state"]]})
    assert opt.state_dict() == {"flat": [0, 1, 2]}
    assert seen == [3, 1.0]


def test_load_state_dict_hooks() -> None:
    """A pre-hook may rewrite the dict before it is taken over."""
    source, target = make("Adam"), make("Adam")
    run(source, 2)
    seen = []

    def unwrap(optimizer: Any, state_dict: Any) -> Any:
        seen.append(optimizer is target)
        return state_dict["wrapped"]

    target.register_load_state_dict_pre_hook(unwrap)
    target.register_load_state_dict_post_hook(lambda o: seen.append(len(o.state)))
    target.load_state_dict({"wrapped": source.state_dict()})
    assert seen == [True, 3]
    assert same_state(source.state_dict(), target.state_dict())


# --- copies, pickles, subclasses --------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", FORMS)
def test_deepcopy_and_pickle(name: str, steps: int) -> None:
    """With the parameters; both go on with the same bits, apart from each other."""
    opt = make(name, grad_clip_norm=0.5, on_nonfinite="skip", skip_grad_norm=1e6)
    run(opt, steps)
    twins = [copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))]
    stream = io.BytesIO()
    torch.save(opt, stream)
    stream.seek(0)
    twins.append(torch.load(stream, weights_only=False))
    for twin in twins:
        assert type(twin) is type(opt)
        assert twin.on_nonfinite == "skip"
        assert twin.skip_grad_norm == 1e6
        assert equal(opt, twin)
        assert same_state(opt.state_dict(), twin.state_dict())
        assert parameters_of(twin)[0] is not parameters_of(opt)[0]
    run(opt, 2, steps)
    for twin in twins:
        assert steps == 0 or not equal(opt, twin)
        run(twin, 2, steps)
        assert equal(opt, twin)
        assert same_state(opt.state_dict(), twin.state_dict())


def test_deepcopy_of_model_and_optimizer_keeps_them_together() -> None:
    model = torch.nn.Linear(4, 3)
    opt = ours.Adam(model.parameters(), lr=0.1)
    run(opt, 2)
    model_copy, opt_copy = copy.deepcopy((model, opt))
    run(opt_copy, 1, 2)
    assert all(
        p is q for p, q in zip(model_copy.parameters(), parameters_of(opt_copy), strict=True)
    )
    assert not torch.equal(model.weight, model_copy.weight)


@pytest.mark.parametrize("name", FORMS)
def test_state_dict_loads_with_weights_only(name: str) -> None:
    """Plain tensors and numbers only: `torch.load`'s default takes them."""
    opt, fresh = make(name), make(name)
    run(opt, 2)
    stream = io.BytesIO()
    torch.save(opt.state_dict(), stream)
    stream.seek(0)
    fresh.load_state_dict(torch.load(stream, weights_only=True))
    assert same_state(opt.state_dict(), fresh.state_dict())


def test_named_parameters() -> None:
    """`param_names` stand in groups and state dicts, and survive a dict without them."""
    model = torch.nn.Linear(4, 3)
    opt = ours.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    run(opt, 1)
    assert opt.param_groups[0]["param_names"] == ["weight", "bias"]
    saved = opt.state_dict()
    assert saved["param_groups"][0]["param_names"] == ["weight", "bias"]
    del saved["param_groups"][0]["param_names"]
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["param_names"] == ["weight", "bias"]
    run(opt, 1, 1)


def test_subclass_of_a_user() -> None:
    """With arguments, a step and attributes of its own; its name stands in messages and repr."""

    class Mine(ours.SGD):
        def __init__(self, params: Any, decay_bias: bool = False) -> None:
            super().__init__(params, lr=0.1, momentum=0.9)
            self.decay_bias = decay_bias
            self.steps = 0

        def step(self, closure: Any = None) -> Any:
            self.steps += 1
            return super().step(closure)

    opt, plain = (
        Mine(parameters(SHAPES), decay_bias=True),
        ours.SGD(parameters(SHAPES), lr=0.1, momentum=0.9),
    )
    run(opt, 3)
    run(plain, 3)
    assert equal(opt, plain)
    assert opt.steps == 3
    assert repr(opt).startswith("Mine (")
    twin = copy.deepcopy(opt)
    assert type(twin) is Mine
    twin.steps = 0
    run(twin, 1, 3)
    run(plain, 1, 3)
    assert equal(twin, plain)


def test_assigned_hyper_parameters_hold_from_the_next_step() -> None:
    """torch.optim.SGD gives the bits."""
    theirs, mine = pair("SGD", shapes=SHAPES, lr=0.1, momentum=0.5)
    changes = itertools.cycle(
        [{"lr": 0.05}, {"momentum": 0.9}, {"weight_decay": 0.1}, {"maximize": True}]
    )
    for step, change in zip(range(8), changes, strict=False):
        for opt in (theirs, mine):
            opt.param_groups[0].update(change)
            run(opt, 1, step)
    assert equal(theirs, mine)


def test_what_the_last_step_did() -> None:
    opt = make("SGD", grad_clip_norm=0.5)
    assert opt.last is None
    assert opt.grad_norm is None
    run(opt, 1)
    grads = [p.grad for p in parameters_of(opt)]
    norm = torch.cat([g.double().flatten() for g in grads]).norm()
    assert abs(opt.last.grad_norm - norm.item()) <= 1e-14 * norm.item()
    assert opt.last.clip_coef == 0.5 / opt.last.grad_norm
    assert opt.grad_norm.shape == ()
    assert opt.grad_norm.dtype == torch.float64
    assert opt.grad_norm.item() == opt.last.grad_norm
    assert opt.skipped_steps == 0


def test_a_group_that_is_filled_in_place() -> None:
    first, second = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    opt = ours.SGD([{"params": [first]}, {"params": []}], lr=0.1)
    for p in (first, second):
        p.grad = torch.ones(3)
    opt.step()
    opt.param_groups[1]["params"].append(second)
    opt.step()
    assert torch.equal(second, torch.full((3,), 0.9))


# --- wrappers that copy attributes ------------------------------------------------------------


class Wrapper:
    """As Lightning Fabric wraps an optimizer: its attributes, and a class derived from its own."""

    def __init__(self, optimizer: Any) -> None:
        vars(self).update(vars(optimizer))
        self.__class__ = type("Wrapper", (Wrapper, type(optimizer)), {})
        self._optimizer = optimizer

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure)

    def load_state_dict(self, state_dict: Any) -> None:
        self._optimizer.load_state_dict(state_dict)
        vars(self).update(vars(self._optimizer))


@pytest.mark.parametrize("stepped", [0, 1])
def test_a_wrapper_that_copies_attributes(stepped: int) -> None:
    """It tells of the last step and of the state, and does not count as one who holds the state."""
    param = torch.nn.Parameter(torch.zeros(4))
    opt = ours.Adam([param], lr=0.1, grad_clip_norm=1.0, on_nonfinite="skip")
    run(opt, stepped)
    wrapper: Any = Wrapper(opt)
    assert isinstance(wrapper, ours.Adam)
    for _ in range(2):
        param.grad = torch.full((4,), 2.0)
        wrapper.step()
    assert opt._ahead
    assert not opt._exposed
    assert wrapper.last is opt.last
    assert wrapper.grad_norm.item() == 4.0
    assert wrapper.state[param]["step"].item() == stepped + 2
    param.grad[1] = float("nan")
    wrapper.step()
    assert wrapper.skipped_steps == opt.skipped_steps == 1
    saved = copy.deepcopy(wrapper.state_dict())
    run(opt, 2, 5)
    wrapper.load_state_dict(saved)
    assert wrapper.state[param]["step"].item() == opt.state[param]["step"].item() == stepped + 2
    run(wrapper, 2, 7)
    assert wrapper.state[param]["step"].item() == stepped + 4
    wrapper.state.clear()
    run(wrapper, 1, 9)
    assert opt.state[param]["step"].item() == 1
    assert copy.deepcopy(opt)._shared is not opt._shared
