"""`master_weights=True`: a float32 master behind every 16-bit parameter."""

from __future__ import annotations

import copy
import io
from typing import Any

import fusedstep
import numpy as np
import pytest
from torch_twins import (
    FORMS,
    SHAPES,
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

HALVES = ["bfloat16", "float16"]
SMALL = [(4, 3), (33,), ()]
FUNCTIONS = {
    "SGD": ("fused_momentum_step", {"momentum": 0.9, "weight_decay": 0.1}),
    "Momentum": ("fused_momentum_step", {"momentum": 0.9}),
    "MomentumNesterov": ("fused_nesterov_step", {"momentum": 0.9}),
    "Adam": ("fused_adam_step", {"amsgrad": True}),
    "AdamW": ("fused_adamw_step", {"amsgrad": True, "weight_decay": 0.1}),
    "NAdam": ("fused_nadam_step", {"momentum_decay": 0.1}),
    "RMSprop": ("fused_rmsprop_step", {"centered": True, "momentum": 0.5}),
}


def make(name: str = "SGD", dtype: str = "bfloat16", shapes: Any = SMALL, **kwargs: Any) -> Any:
    kwargs = {**FORMS[name][1], "lr": 0.01, "master_weights": True, **kwargs}
    return getattr(ours, name)(parameters(shapes, dtype), **kwargs)


def masters(opt: Any) -> list[Any]:
    return [opt.state[p]["master_param"] for p in parameters_of(opt)]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", FORMS)
def test_the_functional_form_with_param_copy(name: str, dtype: str) -> None:
    """Masters, copies and state are those of the function, bit for bit."""
    function, kwargs = FUNCTIONS[name]
    opt = make(name, dtype, SHAPES, grad_clip_norm=0.5)
    half = [p.detach().clone() for p in parameters(SHAPES, dtype)]
    full = [h.float() for h in half]
    state: dict[str, Any] = {}
    for step in range(4):
        run(opt, 1, step)
        grads = [p.grad for p in parameters_of(opt)]
        result = getattr(fusedstep, function)(
            full, grads, **state, lr=0.01, grad_clip_norm=0.5, param_copy=half, **kwargs
        )
        state = result.state
        assert opt.last.grad_norm == result.grad_norm
    for p, master, h, f in zip(parameters_of(opt), masters(opt), half, full, strict=True):
        assert torch.equal(p, h)
        assert torch.equal(master, f)
        assert torch.equal(p, master.to(p.dtype))
    for slot, torch_name in opt._form.buffers.items():
        for p, buffer in zip(parameters_of(opt), state.get(slot, []), strict=bool(state.get(slot))):
            assert torch.equal(opt.state[p][torch_name], buffer)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", FORMS)
def test_a_run_of_a_float32_model(name: str, dtype: str) -> None:
    """The masters are a float32 model that gets the 16-bit gradients, to the bit."""
    opt = make(name, dtype)
    kwargs = {**FORMS[name][1], "lr": 0.01}
    plain = getattr(ours, name)(
        [torch.nn.Parameter(p.detach().float()) for p in parameters_of(opt)], **kwargs
    )
    for step in range(5):
        run(opt, 1, step)
        for p, q in zip(parameters_of(opt), parameters_of(plain), strict=True):
            q.grad = p.grad.float()
        plain.step()
    for p, master, q in zip(parameters_of(opt), masters(opt), parameters_of(plain), strict=True):
        assert torch.equal(master, q)
        assert torch.equal(p, q.to(p.dtype))


def test_small_steps_are_not_lost() -> None:
    """Without a master, bfloat16 swallows every step below half a unit in the last place."""
    with_master, without = (
        ours.SGD(
            [torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))],
            lr=1e-3,
            master_weights=master,
        )
        for master in (True, False)
    )
    for opt in (with_master, without):
        for _ in range(20):
            parameters_of(opt)[0].grad = torch.ones(8, dtype=torch.bfloat16)
            opt.step()
    assert torch.equal(parameters_of(without)[0], torch.ones(8, dtype=torch.bfloat16))
    expected = np.float32(1.0)
    for _ in range(20):
        expected = np.float32(np.float64(expected) - np.float64(np.float32(1e-3)))
    assert masters(with_master)[0][0].item() == expected
    assert parameters_of(with_master)[0][0].item() == torch.tensor(expected).bfloat16().item()


def test_only_16_bit_parameters_have_masters() -> None:
    """In a mixed model the others are updated as ever."""
    params = [*parameters(SMALL, "bfloat16"), *parameters(SMALL)]
    twins = parameters(SMALL)
    opt = ours.Adam(params, master_weights=True)
    plain = ours.Adam(twins)
    for step in range(3):
        give_gradients(params, step)
        for p, q in zip(params[3:], twins, strict=True):
            q.grad = p.grad
        opt.step()
        plain.step()
    assert all(torch.equal(p, q) for p, q in zip(params[3:], twins, strict=True))
    assert ["master_param" in opt.state[p] for p in params] == [True] * 3 + [False] * 3


def test_float32_gradients_of_a_master() -> None:
    """Gradients that were accumulated in float32 enter with all their bits."""
    param = torch.nn.Parameter(torch.ones(33, dtype=torch.bfloat16))
    try:
        param.grad_dtype = torch.float32
    except AttributeError:
        pytest.skip("this torch ties the dtype of a gradient to its parameter's")
    param.grad = torch.full((33,), 1.00390625 + 2**-20)
    opt = ours.SGD([param], lr=1.0, master_weights=True)
    opt.step()
    assert opt.state[param]["master_param"][0].item() == 1.0 - (1.00390625 + 2**-20)


# --- others write the parameter ---------------------------------------------------------------


def add(p: Any) -> None:
    p.add_(0.75)


def multiply(p: Any) -> None:
    p.mul_(3.0)


def one_element(p: Any) -> None:
    p.view(-1)[0] = 5.0


def copy_into(p: Any) -> None:
    p.copy_(torch.full_like(p, 0.3))


CHANGES = {f.__name__: f for f in (add, multiply, one_element, copy_into)}


@pytest.mark.parametrize("change", CHANGES)
def test_what_others_write_goes_into_the_master(change: str) -> None:
    """Elements that were not written keep their float32 values."""
    opt = make("Adam", shapes=[(33,)])
    run(opt, 3)
    param = parameters_of(opt)[0]
    before = masters(opt)[0].clone()
    rounded = param.detach().clone()
    with torch.no_grad():
        CHANGES[change](param)
    kept = param.detach() == rounded
    expected = torch.where(kept, before, param.detach().float())
    twin = ours.Adam([torch.nn.Parameter(expected)], lr=0.01, amsgrad=True)
    saved = copy.deepcopy(opt.state_dict())
    for entry in saved["state"].values():
        del entry["master_param"]
    twin.load_state_dict(saved)
    run(opt, 1, 3)
    parameters_of(twin)[0].grad = param.grad.float()
    twin.step()
    assert torch.equal(masters(opt)[0], parameters_of(twin)[0])


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
@pytest.mark.parametrize("stepped", [False, True])
def test_model_and_optimizer_are_loaded_in_any_order(order: str, stepped: bool) -> None:
    """A run goes on with the same bits; the masters are those that were saved."""

    def model_of() -> Any:
        torch.manual_seed(1)
        return torch.nn.Linear(9, 5).bfloat16()

    model = model_of()
    opt = ours.AdamW(model.parameters(), lr=0.01, master_weights=True)
    run(opt, 4)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    fresh_model = model_of()
    fresh = ours.AdamW(fresh_model.parameters(), lr=0.5, master_weights=True)
    if stepped:
        run(fresh, 2, 20)
    if order == "model first":
        fresh_model.load_state_dict(saved[0])
        fresh.load_state_dict(saved[1])
    else:
        fresh.load_state_dict(saved[1])
        fresh_model.load_state_dict(saved[0])
    run(opt, 2, 4)
    run(fresh, 2, 4)
    assert equal(opt, fresh)
    assert same_state(opt.state_dict(), fresh.state_dict())


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_other_weights_win_over_saved_masters(order: str) -> None:
    """Who loads other weights beside an optimizer's state wants them."""
    opt = make("Adam", shapes=[(33,)])
    run(opt, 3)
    saved = copy.deepcopy(opt.state_dict())
    fresh = make("Adam", shapes=[(33,)])
    param = parameters_of(fresh)[0]

    def load_weights() -> None:
        with torch.no_grad():
            param.fill_(2.0)

    if order == "model first":
        load_weights()
        fresh.load_state_dict(saved)
    else:
        fresh.load_state_dict(saved)
        load_weights()
    run(fresh, 1, 3)
    assert (param - 2.0).abs().max() < 0.1
    assert (masters(fresh)[0] - 2.0).abs().max() < 0.1


def test_nan_that_others_write() -> None:
    opt = make("SGD", shapes=[(33,)])
    run(opt, 1)
    param = parameters_of(opt)[0]
    with torch.no_grad():
        param[3] = float("nan")
    run(opt, 1, 1)
    assert masters(opt)[0].isnan().sum() == 1
    assert param.isnan().sum() == 1


def test_parameter_that_becomes_16_bit_gets_a_master() -> None:
    """`model.bfloat16()` after the optimizer has stepped, and back."""
    param = torch.nn.Parameter(torch.randn(33))
    opt = ours.SGD([param], lr=0.01, momentum=0.9, master_weights=True)
    run(opt, 2)
    assert "master_param" not in opt.state[param]
    param.data = param.data.bfloat16()
    run(opt, 2, 2)
    master = opt.state[param]["master_param"]
    assert torch.equal(master.bfloat16(), param)
    assert not torch.equal(master.bfloat16().float(), master)
    param.data = param.data.float()
    run(opt, 1, 4)
    assert param.dtype == torch.float32


# --- state ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_masters_are_saved(name: str) -> None:
    """A resumed run has the same bits; through a file, too."""
    opt = make(name)
    run(opt, 3)
    stream = io.BytesIO()
    torch.save(opt.state_dict(), stream)
    stream.seek(0)
    fresh = make(name)
    with torch.no_grad():
        for p, q in zip(parameters_of(fresh), parameters_of(opt), strict=True):
            p.copy_(q)
    fresh.load_state_dict(torch.load(stream))
    assert same_state(fresh.state_dict(), opt.state_dict())
    run(opt, 2, 3)
    run(fresh, 2, 3)
    assert equal(opt, fresh)
    assert all(torch.equal(a, b) for a, b in zip(masters(opt), masters(fresh), strict=True))


def test_checkpoints_of_torch_have_no_master() -> None:
    """Theirs starts one from the parameter; ours without masters leaves a saved one out."""
    theirs = torch.optim.Adam(parameters(SMALL, "bfloat16"), lr=0.01, amsgrad=True)
    run(theirs, 2)
    mine = ours.Adam(
        [torch.nn.Parameter(p.detach().clone()) for p in parameters_of(theirs)],
        master_weights=True,
    )
    mine.load_state_dict(theirs.state_dict())
    values = [p.detach().float() for p in parameters_of(mine)]
    plain = ours.Adam([torch.nn.Parameter(v) for v in values])
    plain.load_state_dict(theirs.state_dict())
    run(mine, 1, 2)
    for p, q in zip(parameters_of(mine), parameters_of(plain), strict=True):
        q.grad = p.grad.float()
    plain.step()
    assert all(torch.equal(m, q) for m, q in zip(masters(mine), parameters_of(plain), strict=True))
    without = ours.Adam(parameters(SMALL, "bfloat16"))
    without.load_state_dict(mine.state_dict())
    assert all("master_param" not in entry for entry in without.state.values())


def test_masters_go_into_a_checkpoint_for_torch() -> None:
    """torch's class loads the dict, with one entry more that it does not use."""
    opt = make("Adam")
    run(opt, 2)
    theirs = torch.optim.Adam(parameters(SMALL, "bfloat16"), amsgrad=True)
    theirs.load_state_dict(copy.deepcopy(opt.state_dict()))
    run(theirs, 1, 2)


def test_copies_have_masters_of_their_own() -> None:
    opt = make("Adam")
    run(opt, 2)
    twin = copy.deepcopy(opt)
    run(opt, 1, 2)
    assert not torch.equal(masters(opt)[0], masters(twin)[0])
    run(twin, 1, 2)
    assert all(torch.equal(a, b) for a, b in zip(masters(opt), masters(twin), strict=True))
    assert all(
        a.data_ptr() != b.data_ptr() for a, b in zip(masters(opt), masters(twin), strict=True)
    )


def test_masters_in_the_hands_of_the_user() -> None:
    """A replaced master is what the next step starts from, unless the parameter says otherwise."""
    opt = make("SGD", shapes=[(33,)])
    run(opt, 1)
    param = parameters_of(opt)[0]
    finer = param.detach().float() * (1 + 2**-12)
    assert torch.equal(finer.bfloat16(), param)
    opt.state[param]["master_param"] = finer.clone()
    twin = copy.deepcopy(opt)
    run(opt, 1, 1)
    run(twin, 1, 1)
    moved = (masters(opt)[0] - finer).abs().max().item()
    assert 0 < moved < 0.2
    assert equal(opt, twin)


def load(opt: Any) -> None:
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))


def add_group(opt: Any) -> None:
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2).bfloat16())]})


def move(opt: Any) -> None:
    param = parameters_of(opt)[0]
    param.data = param.data.clone()


def replace(opt: Any) -> None:
    state = opt.state[parameters_of(opt)[0]]
    state["master_param"] = state["master_param"].clone()


def replace_by_other_strides(opt: Any) -> None:
    state = opt.state[parameters_of(opt)[0]]
    state["master_param"] = state["master_param"].t().contiguous().t()


def replace_by_double(opt: Any) -> None:
    state = opt.state[parameters_of(opt)[0]]
    state["master_param"] = state["master_param"].double()


REBINDINGS = (load, add_group, move, replace, replace_by_other_strides, replace_by_double)


@pytest.mark.parametrize("how", REBINDINGS)
@pytest.mark.parametrize("again", [False, True])
def test_there_is_one_master(how: Any, again: bool) -> None:
    """The tensor in the state is the one that is updated, at any time; no other one is kept."""
    opt, twin = (make("SGD", shapes=[(7, 5)]) for _ in range(2))
    run(opt, 2)
    run(twin, 2)
    if again:
        how(opt)
    how(opt)
    param = parameters_of(opt)[0]
    held = opt.state[param]["master_param"]
    for step in range(2, 4):
        run(opt, 1, step)
        run(twin, 1, step)
        assert opt._state[param]["master_param"] is opt._bound.leaves[0].master
        assert torch.equal(opt._state[param]["master_param"], masters(twin)[0])
        if how in {load, add_group, move}:
            assert held is opt._bound.leaves[0].master
    assert torch.equal(param, parameters_of(twin)[0])


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (lambda p: torch.ones(p.numel() + 1), ValueError, "master_param has shape"),
        (lambda _: torch.ones(1), ValueError, "master_param has shape"),
        (lambda _: "nothing", TypeError, "master_param is 'nothing', no tensor"),
    ],
)
def test_unusable_masters_are_refused_at_the_step(value: Any, error: Any, text: str) -> None:
    opt = make("SGD", shapes=[(33,)])
    run(opt, 2)
    param = parameters_of(opt)[0]
    before = param.detach().clone()
    kept, opt.state[param]["master_param"] = opt.state[param]["master_param"], value(param)
    with pytest.raises(error, match=text):
        run(opt, 1, 2)
    assert torch.equal(param, before)
    opt.state[param]["master_param"] = kept
    run(opt, 1, 2)


# --- steps that do nothing --------------------------------------------------------------------


def test_a_skipped_step_changes_nothing() -> None:
    for policy in ("skip", "raise"):
        opt = make("Adam", on_nonfinite=policy)
        run(opt, 2)
        before = snapshot(opt)
        give_gradients(parameters_of(opt), 3)
        parameters_of(opt)[1].grad[4] = float("nan")
        if policy == "raise":
            with pytest.raises(FloatingPointError):
                opt.step()
        else:
            opt.step()
        assert unchanged(opt, before)
        run(opt, 1, 4)


def test_parameters_without_gradient_stay() -> None:
    opt = make("Adam")
    run(opt, 2)
    before = snapshot(opt)
    params = parameters_of(opt)
    give_gradients(params, 2)
    params[0].grad = None
    opt.step()
    assert torch.equal(params[0], before[0][0][0])
    assert params[0]._version == before[0][0][1]
    assert opt.state[params[0]]["step"].item() == 2.0
    assert opt.state[params[1]]["step"].item() == 3.0


def test_strided_16_bit_parameters_are_refused() -> None:
    param = torch.nn.Parameter(torch.ones(5, 2, dtype=torch.bfloat16)[:, 0])
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=r"\['params'\]\[0\].*master needs a dense parameter"):
        ours.SGD([param], master_weights=True).step()


def test_transposed_parameters() -> None:
    """A master has its parameter's strides."""
    value = torch.randn(5, 7).bfloat16()
    params = [torch.nn.Parameter(value.t().contiguous().t()), torch.nn.Parameter(value.clone())]
    opts = [ours.Adam([p], lr=0.01, master_weights=True) for p in params]
    for step in range(3):
        for opt in opts:
            run(opt, 1, step)
    assert torch.equal(*params)
    assert masters(opts[0])[0].stride() == params[0].stride() == (1, 5)


def test_weights_that_are_put_in_as_a_whole() -> None:
    """`vector_to_parameters` gives parameters other memory; no version counter tells."""
    opt = make(momentum=0.0)
    params = parameters_of(opt)
    give_gradients(params, 0)
    opt.step()
    total = sum(p.numel() for p in params)
    values = torch.linspace(-2, 2, total).to(params[0].dtype)
    torch.nn.utils.vector_to_parameters(values, params)
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.step()
    assert torch.equal(torch.nn.utils.parameters_to_vector(params), values)
