"""State dicts both ways between torch.optim and ours, and what a user may do with the state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from torch_twins import (
    FORMS,
    difference,
    equal,
    give_gradients,
    ours,
    parameters,
    parameters_of,
    run,
    same_state,
    snapshot,
    torch,
    unchanged,
)

pytestmark = pytest.mark.framework("torch")

SHAPES = [(4, 3), (7,), (), (0,), (33,)]


def no_step(_opt: Any) -> None:
    """Nothing happened yet."""


def some_steps(opt: Any) -> None:
    run(opt, 3)


def late_gradients(opt: Any) -> None:
    """The second parameter gets its first gradient at the third step, the last one never."""
    params = parameters_of(opt)
    for step in range(4):
        give_gradients(params, step)
        params[-1].grad = None
        if step < 2:
            params[1].grad = None
        opt.step()


def momentum_comes_later(opt: Any) -> None:
    group = opt.param_groups[0]
    kept = group.get("momentum") if "dampening" in group else None  # torch's RMSprop cannot
    if kept:
        group["momentum"] = 0.0
    run(opt, 2)
    if kept:
        group["momentum"] = kept
        run(opt, 2, 2)


HISTORIES = {f.__name__: f for f in (no_step, some_steps, late_gradients, momentum_comes_later)}
# torch's class, its arguments; ours of the same name where nothing else is said
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sgd": ("SGD", "SGD", {}),
    "momentum": ("SGD", "SGD", {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "nesterov": ("SGD", "SGD", {"momentum": 0.9, "nesterov": True}),
    "adam": ("Adam", "Adam", {}),
    "amsgrad": ("Adam", "Adam", {"amsgrad": True}),
    "adamw": ("AdamW", "AdamW", {"amsgrad": True}),
    "nadam": ("NAdam", "NAdam", {"momentum_decay": 0.1}),
    "nadamw": ("NAdam", "NAdam", {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    "rmsprop": ("RMSprop", "RMSprop", {}),
    "centered": ("RMSprop", "RMSprop", {"centered": True, "momentum": 0.9}),
}


def make(module: Any, name: str, dtype: str, kwargs: dict[str, Any], params: Any = None) -> Any:
    if params is None:
        params = parameters(SHAPES, dtype)
    else:
        params = [torch.nn.Parameter(p.detach().clone()) for p in params]
    return getattr(module, name)(params, lr=0.01, **kwargs)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("kind", KINDS)
def test_both_ways(kind: str, history: str, dtype: str) -> None:
    """A run goes on in the other library: bit for bit with SGD, else to rounding.

    And ours goes on from its own checkpoint, and from its own by way of torch, bit for bit.
    """
    theirs_name, name, kwargs = KINDS[kind]
    theirs, mine = (make(torch.optim, theirs_name, dtype, kwargs), make(ours, name, dtype, kwargs))
    for opt in (theirs, mine):
        HISTORIES[history](opt)
    assert theirs.state_dict()["state"].keys() == mine.state_dict()["state"].keys()
    moved = make(ours, name, dtype, kwargs, parameters_of(theirs))
    moved.load_state_dict(theirs.state_dict())
    back = make(torch.optim, theirs_name, dtype, kwargs, parameters_of(mine))
    back.load_state_dict(copy.deepcopy(mine.state_dict()))  # torch takes buffers as they are
    resumed = make(ours, name, dtype, kwargs, parameters_of(mine))
    resumed.load_state_dict(back.state_dict())
    for opt in (theirs, mine, moved, back, resumed):
        run(opt, 3, 10)
    assert equal(mine, resumed)
    if kwargs.get("momentum_decay") is None and "decoupled" not in str(kwargs):
        assert same_state(mine.state_dict(), resumed.state_dict())
    if theirs_name == "SGD":
        assert equal(theirs, moved)
        assert equal(mine, back)
        assert equal(theirs, mine)
    else:
        tolerance = 1e-8 if dtype == "float64" else 2e-6  # parameters are of size 1
        assert difference(theirs, moved) < tolerance
        assert difference(mine, back) < tolerance


def test_momentum_of_rmsprop_comes_later() -> None:
    """torch.optim.RMSprop raises KeyError: 'momentum_buffer' there; ours starts the buffer."""
    opt = make(ours, "RMSprop", "float64", {})
    run(opt, 2)
    fresh = make(ours, "RMSprop", "float64", {"momentum": 0.9}, parameters_of(opt))
    fresh.load_state_dict(opt.state_dict())
    for each in (opt, fresh):
        each.param_groups[0]["momentum"] = 0.9
        run(each, 2, 2)
    assert equal(opt, fresh)
    theirs = make(torch.optim, "RMSprop", "float64", {})
    run(theirs, 2)
    theirs.param_groups[0]["momentum"] = 0.9
    with pytest.raises(KeyError, match="momentum_buffer"):
        run(theirs, 1, 2)


@pytest.mark.parametrize(("source", "target"), [("Momentum", "SGD"), ("SGD", "MomentumNesterov")])
def test_classes_of_one_state(source: str, target: str) -> None:
    """What the class settles stays settled, as with torch.optim.AdamW: `nesterov`."""
    first = make(ours, source, "float32", {"momentum": 0.9})
    run(first, 2)
    second = make(ours, target, "float32", {"momentum": 0.5}, parameters_of(first))
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["momentum"] == 0.9
    assert second.param_groups[0]["nesterov"] is (target == "MomentumNesterov")
    other = torch.optim.SGD(
        [torch.nn.Parameter(p.detach().clone()) for p in parameters_of(first)],
        lr=0.01,
        momentum=0.9,
        nesterov=target == "MomentumNesterov",
    )
    saved = first.state_dict()
    saved["param_groups"][0]["nesterov"] = target == "MomentumNesterov"
    other.load_state_dict(copy.deepcopy(saved))
    run(second, 2, 2)
    run(other, 2, 2)
    assert equal(second, other)


def test_adam_loads_into_adamw_as_in_torch() -> None:
    twins = []
    for module in (torch.optim, ours):
        first = make(module, "Adam", "float64", {"weight_decay": 0.1})
        run(first, 2)
        second = make(module, "AdamW", "float64", {}, parameters_of(first))
        second.load_state_dict(first.state_dict())
        assert second.param_groups[0]["decoupled_weight_decay"] is True
        run(second, 2, 2)
        twins.append(second)
    assert difference(*twins) < 1e-9


def test_old_checkpoints() -> None:
    """Without newer keys in their groups, with numbers for `step`, with empty momentum buffers."""
    opt = make(ours, "Adam", "float32", {"amsgrad": True, "grad_clip_norm": 0.5})
    run(opt, 2)
    saved = opt.state_dict()
    for key in ("foreach", "capturable", "fused", "grad_clip_norm", "decoupled_weight_decay"):
        del saved["param_groups"][0][key]
    for number in (2, 2.0):
        for entries in saved["state"].values():
            entries["step"] = number
        fresh = make(ours, "Adam", "float32", {"grad_clip_norm": 0.5}, parameters_of(opt))
        fresh.load_state_dict(saved)
        assert same_state(fresh.state_dict(), opt.state_dict())
        assert fresh.param_groups[0]["grad_clip_norm"] == 0.5
        assert fresh.param_groups[0]["amsgrad"] is True
    empty = make(ours, "SGD", "float32", {"momentum": 0.9})
    saved = empty.state_dict()
    saved["state"] = {k: {"momentum_buffer": None} for k in range(len(SHAPES))}
    empty.load_state_dict(saved)
    plain = make(ours, "SGD", "float32", {"momentum": 0.9})
    run(empty, 2)
    run(plain, 2)
    assert equal(empty, plain)


# --- dtypes and strides -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", FORMS)
def test_state_of_16_bit_parameters_stays_float32(name: str, dtype: str) -> None:
    """torch's load_state_dict would round it: here it comes back with its bits."""
    opt = make(ours, name, dtype, FORMS[name][1])
    run(opt, 3)
    buffers = [b for e in opt.state.values() for k, b in e.items() if b.numel() and k != "step"]
    assert buffers
    assert all(b.dtype == torch.float32 for b in buffers if b.dim())
    assert any(not torch.equal(b, b.to(getattr(torch, dtype)).float()) for b in buffers)
    fresh = make(ours, name, dtype, FORMS[name][1], parameters_of(opt))
    fresh.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert same_state(fresh.state_dict(), opt.state_dict())
    run(opt, 2, 3)
    run(fresh, 2, 3)
    assert equal(opt, fresh)


@pytest.mark.parametrize("name", ["SGD", "Adam", "NAdam", "RMSprop"])
def test_16_bit_state_of_torch_becomes_float32(name: str) -> None:
    kwargs = FORMS[name][1]
    theirs = make(torch.optim, name, "bfloat16", kwargs)
    run(theirs, 2)
    mine = make(ours, name, "bfloat16", kwargs, parameters_of(theirs))
    mine.load_state_dict(theirs.state_dict())
    for p, q in zip(parameters_of(theirs), parameters_of(mine), strict=True):
        for key, value in theirs.state[p].items():
            assert mine.state[q][key].dtype == (
                torch.float32 if key != "mu_product" else torch.float64
            )
            assert torch.equal(mine.state[q][key].to(value.dtype), value)
    run(mine, 1, 2)


@pytest.mark.parametrize("name", FORMS)
def test_strides_follow_the_parameter(name: str) -> None:
    """A checkpoint of contiguous buffers goes into channels_last and transposed parameters."""
    torch.manual_seed(0)
    values = torch.randn(4, 3, 5, 6), torch.randn(5, 7)
    plain = getattr(ours, name)([torch.nn.Parameter(v.clone()) for v in values])
    run(plain, 2)
    params = [
        torch.nn.Parameter(p.detach().clone(memory_format=torch.channels_last))
        if p.dim() == 4
        else torch.nn.Parameter(p.detach().t().contiguous().t())
        for p in parameters_of(plain)
    ]
    other = getattr(ours, name)(params)
    other.load_state_dict(plain.state_dict())
    for param in params:
        assert not param.is_contiguous()
        for value in other.state[param].values():
            assert value.dim() == 0 or value.stride() == param.stride()
    run(plain, 2, 2)
    run(other, 2, 2)
    assert equal(plain, other)


def test_loaded_buffers_are_copies() -> None:
    """Neither side sees what the other does afterwards."""
    first = make(ours, "Adam", "float32", {})
    run(first, 1)
    second = make(ours, "Adam", "float32", {}, parameters_of(first))
    second.load_state_dict(first.state_dict())
    before = copy.deepcopy(first.state_dict())
    run(second, 1, 1)
    assert same_state(first.state_dict(), before)
    theirs = make(torch.optim, "Adam", "float32", {}, parameters_of(first))
    saved = {**before, "state": {k: dict(v) for k, v in before["state"].items()}}
    for key, entry in saved["state"].items():  # torch counts in the tensors that it was given
        entry["step"] = first.state_dict()["state"][key]["step"]
    theirs.load_state_dict(saved)
    run(theirs, 1, 1)
    assert first.state_dict()["state"][0]["step"].item() == 1.0
    assert first.state[parameters_of(first)[0]]["step"].item() == 1.0


# --- damaged dicts ----------------------------------------------------------------------------

DAMAGES: dict[str, tuple[Any, str]] = {
    "no groups": (lambda d: d["param_groups"].clear(), "number of parameter groups"),
    "one group more": (lambda d: d["param_groups"].append({"params": []}), "parameter groups"),
    "a parameter less": (
        lambda d: d["param_groups"][0]["params"].pop(),
        "size of optimizer's group",
    ),
    "a parameter more": (lambda d: d["param_groups"][0]["params"].append(9), "size of optimizer's"),
    "no state": (lambda d: d.pop("state"), "state"),
    "a shape": (lambda d: d["state"][1].update(exp_avg=torch.ones(8)), r"exp_avg.*\(8,\)"),
    "a shape that broadcasts": (
        lambda d: d["state"][0].update(exp_avg=torch.ones(1, 3)),
        "exp_avg",
    ),
    "no tensor": (lambda d: d["state"][1].update(exp_avg_sq="much"), "exp_avg_sq.*'much'"),
    "a number for a tensor": (lambda d: d["state"][1].update(exp_avg=1.0), "exp_avg"),
    "a complex buffer": (lambda d: d["state"][1].update(exp_avg=torch.ones(7) * 1j), "complex"),
    "no count": (lambda d: d["state"][1].update(step="two"), "step.*'two'"),
    "a negative count": (lambda d: d["state"][1].update(step=torch.tensor(-1.0)), "step.*-1"),
    "NaN as a count": (lambda d: d["state"][1].update(step=float("nan")), "step.*nan"),
    "inf as a count": (
        lambda d: d["state"][1].update(step=torch.tensor(1e39).double() * 1e300),
        "step",
    ),
    "several counts": (lambda d: d["state"][1].update(step=torch.ones(2)), "step"),
    "no dict": (lambda d: d["state"].update({1: [1, 2]}), "state of a parameter"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_dicts_change_nothing(damage: str) -> None:
    spoil, text = DAMAGES[damage]
    opt = make(ours, "Adam", "float32", {})
    run(opt, 2)
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0]["lr"] = 0.5
    spoil(saved)
    before = snapshot(opt)
    with pytest.raises((KeyError, TypeError, ValueError), match=text):
        opt.load_state_dict(saved)
    assert unchanged(opt, before)
    assert opt.param_groups[0]["lr"] == 0.01
    twin = make(ours, "Adam", "float32", {})
    run(twin, 2)
    run(opt, 1, 2)
    run(twin, 1, 2)
    assert equal(opt, twin)


def test_a_product_out_of_range() -> None:
    opt = make(ours, "NAdam", "float32", {})
    run(opt, 1)
    saved = opt.state_dict()
    saved["state"][0]["mu_product"] = torch.tensor(1.5)
    with pytest.raises(ValueError, match=r"mu_product is 1\.5"):
        opt.load_state_dict(saved)


def test_state_of_nobody() -> None:
    """State under keys that are no parameter's is kept, as torch keeps it."""
    opt = make(ours, "Adam", "float32", {})
    run(opt, 1)
    saved = opt.state_dict()
    saved["state"]["clock"] = {"exp_avg": torch.ones(3), "step": 4}
    saved["state"][17] = "anything"
    opt.load_state_dict(saved)
    run(opt, 1, 1)
    again = opt.state_dict()["state"]
    assert torch.equal(again["clock"]["exp_avg"], torch.ones(3))
    assert again["clock"]["step"] == 4
    assert again[17] == "anything"


def test_entries_of_the_user_travel() -> None:
    opt = make(ours, "SGD", "float32", {"momentum": 0.9})
    run(opt, 1)
    param = parameters_of(opt)[0]
    opt.state[param]["visits"] = torch.tensor([3, 4])
    opt.state[param]["note"] = "seen"
    fresh = make(ours, "SGD", "float32", {"momentum": 0.9})
    fresh.load_state_dict(opt.state_dict())
    run(fresh, 1, 1)
    entry = fresh.state[parameters_of(fresh)[0]]
    assert torch.equal(entry["visits"], torch.tensor([3, 4]))
    assert entry["note"] == "seen"


# --- the state in the hands of the user -------------------------------------------------------


def change_buffer(state: Any, p: Any) -> None:
    state[p]["momentum_buffer"].mul_(0.5)


def replace_buffer(state: Any, p: Any) -> None:
    state[p]["momentum_buffer"] = torch.full_like(p, 0.25).detach()


def delete_buffer(state: Any, p: Any) -> None:
    del state[p]["momentum_buffer"]


def delete_entry(state: Any, p: Any) -> None:
    del state[p]


def clear(state: Any, _p: Any) -> None:
    state.clear()


def add_entry(state: Any, p: Any) -> None:
    state[p] = {"momentum_buffer": torch.ones(p.shape)}


CHANGES = {
    f.__name__: f
    for f in (change_buffer, replace_buffer, delete_buffer, delete_entry, clear, add_entry)
}


@pytest.mark.parametrize("held", ["read anew", "dict held", "entry held"])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_the_state(change: str, held: str) -> None:
    """What the user does to `opt.state` counts, also to a dict that he got steps ago.

    torch.optim.SGD gives the bits.
    """
    twins = []
    for module in (torch.optim, ours):
        opt = make(module, "SGD", "float32", {"momentum": 0.9})
        param = parameters_of(opt)[0]
        state = opt.state if held == "dict held" else None
        run(opt, 1)
        entry = opt.state[param] if held == "entry held" else None
        run(opt, 2, 1)
        if entry is not None and "entry" not in change and change != "clear":
            CHANGES[change]({param: entry}, param)
        else:
            CHANGES[change](state if state is not None else opt.state, param)
        run(opt, 2, 3)
        del state, entry
        twins.append(opt)
    assert equal(*twins)
    assert same_state(*(opt.state_dict() for opt in twins))


@pytest.mark.parametrize("name", FORMS)
def test_a_held_entry_is_up_to_date(name: str) -> None:
    """Counts and new buffers appear in it after each step, as in torch."""
    opt = make(ours, name, "float32", FORMS[name][1])
    param = parameters_of(opt)[0]
    entry = opt.state[param]
    assert entry == {}
    for step in range(1, 4):
        run(opt, 1, step)
        assert "step" not in opt._form.scalars or entry["step"].item() == step
        assert set(opt._form.buffers.values()) <= entry.keys()
    assert opt.state[param] is entry


def test_nothing_is_published_while_nobody_looks() -> None:
    """The dict is brought up to date when it is read: a step costs nothing for it."""
    opt = make(ours, "Adam", "float32", {})
    run(opt, 2)
    assert opt._ahead
    assert not opt._exposed
    opt.state_dict()
    assert not opt._ahead
    run(opt, 2, 2)
    assert opt._ahead
    assert not opt._exposed


def test_assigned_state_starts_anew() -> None:
    """`optimizer.state = defaultdict(dict)`: a reset, as some programs do it."""
    twins = []
    for module in (torch.optim, ours):
        opt = make(module, "Adam", "float64", {})
        run(opt, 3)
        opt.state = type(opt.state)(dict)
        run(opt, 2, 3)
        assert opt.state[parameters_of(opt)[0]]["step"].item() == 2.0
        twins.append(opt)
    assert difference(*twins) < 1e-9


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (lambda p: torch.ones(p.numel() + 1), ValueError, "shape"),
        (lambda _: "nothing", TypeError, "no tensor"),
        (lambda p: torch.ones(p.shape, dtype=torch.int64), TypeError, "int64"),
    ],
)
def test_unusable_buffers_are_refused_at_the_step(value: Any, error: Any, text: str) -> None:
    opt = make(ours, "SGD", "float32", {"momentum": 0.9})
    run(opt, 1)
    param = parameters_of(opt)[1]
    kept, opt.state[param]["momentum_buffer"] = opt.state[param]["momentum_buffer"], value(param)
    values = [p.detach().clone() for p in parameters_of(opt)]
    with pytest.raises(error, match=text):
        run(opt, 1, 1)
    assert all(torch.equal(p, v) for p, v in zip(parameters_of(opt), values, strict=True))
    opt.state[param]["momentum_buffer"] = kept
    run(opt, 1, 1)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0, "one"])
@pytest.mark.parametrize("name", ["step", "mu_product"])
def test_unusable_counts_are_refused_at_the_step(name: str, value: Any) -> None:
    """Divided by what they give, parameters would be NaN without a word."""
    opt = make(ours, "NAdam", "float32", {})
    run(opt, 1)
    param = parameters_of(opt)[1]
    bad = torch.tensor(value) if isinstance(value, float) else value
    kept, opt.state[param][name] = opt.state[param][name], bad
    values = [p.detach().clone() for p in parameters_of(opt)]
    with pytest.raises(ValueError, match=f"state: {name} is {value}|state: {name} is 'one'"):
        run(opt, 1, 1)
    assert all(torch.equal(p, v) for p, v in zip(parameters_of(opt), values, strict=True))
    opt.state[param][name] = kept
    run(opt, 1, 1)


def test_16_bit_state_of_a_user_is_kept() -> None:
    """A bfloat16 buffer that is put into the state is updated as such."""
    param = torch.nn.Parameter(torch.ones(33, dtype=torch.bfloat16))
    opt = ours.SGD([param], lr=0.1, momentum=0.9)
    buffer = torch.ones(33, dtype=torch.bfloat16)
    opt.state[param]["momentum_buffer"] = buffer
    param.grad = torch.ones_like(param)
    opt.step()
    assert opt.state[param]["momentum_buffer"] is buffer
    assert buffer[0].item() == torch.tensor(1.9).bfloat16().item()


OTHER_MEMORY = {
    "double": lambda p: p.data.double(),
    "channels_last": lambda p: p.data.contiguous(memory_format=torch.channels_last),
    "half": lambda p: p.data.half(),
    "strided": lambda p: torch.stack([p.data, p.data], -1)[..., 0],
    "elsewhere": lambda p: p.data.clone(),
}


@pytest.mark.parametrize("second", OTHER_MEMORY)
@pytest.mark.parametrize("first", OTHER_MEMORY)
def test_parameters_that_get_other_memory(first: str, second: str) -> None:
    """`model.double()`, `.to(memory_format=...)`, `.half()`, in the middle of a run and again."""
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(4, 3, 5, 6))
    opt = ours.SGD([param], lr=0.1, momentum=0.9)
    run(opt, 2)
    for step, how in enumerate((first, second), 2):
        buffer = opt.state[param]["momentum_buffer"].clone()
        value = OTHER_MEMORY[how](param)
        if buffer.dtype == torch.float64 != value.dtype:  # refused, see below: the user rounds it
            buffer = buffer.to(torch.float32)
            opt.state[param]["momentum_buffer"] = buffer.clone()
        param.data = value
        twin = torch.nn.Parameter(value.clone())
        other = ours.SGD([twin], lr=0.1, momentum=0.9)
        other.state[twin]["momentum_buffer"] = buffer
        run(opt, 1, step)
        run(other, 1, step)
        assert torch.equal(param, twin)
        assert param.data_ptr() == value.data_ptr()


def test_float64_state_of_a_float32_parameter_is_refused() -> None:
    """It would have to be rounded; the user may do so."""
    param = torch.nn.Parameter(torch.ones(3))
    opt = ours.SGD([param], lr=0.1, momentum=0.9)
    opt.state[param]["momentum_buffer"] = torch.ones(3, dtype=torch.float64)
    param.grad = torch.ones(3)
    with pytest.raises(TypeError, match="dtype float64 does not go with"):
        opt.step()
    assert torch.equal(param, torch.ones(3))


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("how", ["share_memory_", "set_", "data"])
def test_states_that_get_other_memory(how: str, held: bool) -> None:
    """`share_memory_()` and the like move a buffer; it was in hands over a step, or was not."""
    param = torch.nn.Parameter(torch.zeros(5000))
    opt = ours.SGD([param], lr=1.0, momentum=0.5)
    for _ in range(3):
        param.grad = torch.ones(5000)
        opt.step()
    buffer = opt.state[param]["momentum_buffer"]
    assert buffer[0].item() == 1.75
    if held:
        opt.step()
        opt.step()
    value = buffer[0].item()
    if how == "share_memory_":
        buffer.share_memory_()
    elif how == "set_":
        buffer.set_(torch.full((5000,), value))
    else:
        buffer.data = torch.full((5000,), value)
    del buffer
    for _ in range(2):
        value = 0.5 * value + 1.0
        opt.step()
        assert torch.equal(opt.state[param]["momentum_buffer"], torch.full((5000,), value))
