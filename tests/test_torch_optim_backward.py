"""Optimizers in the backward pass: norms taken as gradients arrive, one optimizer per parameter."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch_twins import FORMS, equal, ours, parameters_of, torch

pytestmark = pytest.mark.framework("torch")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models are small, and threads of torch that wait for each other are slow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model_of(dtype: str = "float32") -> Any:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(9, 33), torch.nn.Tanh(), torch.nn.Linear(33, 129), torch.nn.Linear(129, 3)
    )
    return model.to(getattr(torch, dtype))


class Twins:
    """The same model twice, with the norm taken in the backward pass and without."""

    def __init__(self, name: str = "SGD", dtype: str = "float32", **kwargs: Any) -> None:
        kwargs = {"lr": 0.1, "grad_clip_norm": 0.05, **kwargs}
        self.models = model_of(dtype), model_of(dtype)
        make = getattr(ours, name)
        self.opts = [
            make(model.parameters(), norm_in_backward=observed, **kwargs)
            for model, observed in zip(self.models, (True, False), strict=True)
        ]

    def each(self, act: Callable[[Any, Any], Any]) -> None:
        """The same with both."""
        for model, opt in zip(self.models, self.opts, strict=True):
            act(model, opt)

    def backward(self, seed: int = 0, **kwargs: Any) -> None:
        self.each(lambda model, _: loss_of(model, seed).backward(**kwargs))

    def step(self) -> None:
        self.each(lambda _, opt: opt.step())
        self.check()

    def check(self) -> None:
        """The same bits of norms and parameters."""
        first, second = (opt.last for opt in self.opts)
        assert first.grad_norm == second.grad_norm
        assert first.clip_coef == second.clip_coef
        assert first.skipped == second.skipped
        assert equal(*self.opts)

    def zero_grad(self) -> None:
        self.each(lambda _, opt: opt.zero_grad())


def loss_of(model: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    x = torch.randn(8, 9, generator=generator, dtype=torch.float64).to(dtype)
    return model(x).square().mean()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each step, whether it found all norms taken."""
    found: list[bool] = []
    from fusedstep.torch.backward import Observer

    complete = Observer.complete

    def noting(self: Any, bound: Any) -> bool:
        found.append(complete(self, bound))
        return found[-1]

    monkeypatch.setattr(Observer, "complete", noting)
    return found


@pytest.fixture
def observed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The index of each gradient that is measured, in order."""
    found: list[int] = []
    from fusedstep.torch.backward import Observer

    observe = Observer.observe

    def noting(self: Any, index: int, grad: Any) -> None:
        found.append(index)
        observe(self, index, grad)

    monkeypatch.setattr(Observer, "observe", noting)
    return found


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("name", FORMS)
def test_the_same_bits(name: str, dtype: str, counted: list[bool], observed: list[int]) -> None:
    """Norm, coefficient, parameters and state, with the norm taken in the backward pass."""
    twins = Twins(name, dtype)
    for seed in range(3):
        twins.backward(seed)
        twins.step()
        twins.zero_grad()
    assert counted == [True] * 3
    assert sorted(observed) == sorted(list(range(6)) * 3)


def test_step_without_backward(counted: list[bool]) -> None:
    """Gradients that are assigned are measured by the step."""
    twins = Twins()
    for seed in range(2):

        def assign(model: Any, _opt: Any, seed: int = seed) -> None:
            generator = torch.Generator().manual_seed(seed)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)

        twins.each(assign)
        twins.step()
    assert counted == [False, False]


def test_several_backward_passes() -> None:
    """Accumulation: the last measurement of each gradient counts; also of one graph, kept."""
    twins = Twins()
    for seed in range(3):
        twins.backward(seed)
        twins.backward(seed + 10)
        twins.step()
        twins.zero_grad()

    def twice(model: Any, _opt: Any) -> None:
        loss = loss_of(model, 3)
        loss.backward(retain_graph=True)
        loss.backward()

    twins.each(twice)
    twins.step()


def test_backward_of_a_part() -> None:
    """`inputs=`, and a part of the model: what has no gradient, or an old one, is not measured."""
    twins = Twins()
    twins.each(lambda m, _: loss_of(m).backward(inputs=[m[0].weight]))
    twins.step()
    twins.backward(1)  # on top of the old gradients
    twins.step()
    twins.zero_grad()
    twins.each(lambda m, _: m[0].weight.square().sum().backward())
    twins.step()


def clip(model: Any) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)


def clip_value(model: Any) -> None:
    torch.nn.utils.clip_grad_value_(model.parameters(), 1e-4)


def multiply_all(model: Any) -> None:
    torch._foreach_mul_([p.grad for p in model.parameters()], 0.3)


def multiply_one(model: Any) -> None:
    model[0].weight.grad.mul_(7.0)


def multiply_a_view(model: Any) -> None:
    model[0].weight.grad[0].mul_(7.0)


def multiply_detached(model: Any) -> None:
    model[0].weight.grad.detach().mul_(7.0)


def replace(model: Any) -> None:
    model[0].weight.grad = model[0].weight.grad * 5


def replace_by_a_copy(model: Any) -> None:
    """The same memory is likely to be given to the new one."""
    shape = model[0].weight.grad.shape
    model[0].weight.grad = None
    model[0].weight.grad = torch.full(shape, 0.5)


def remove(model: Any) -> None:
    model[0].weight.grad = None


def zero(model: Any) -> None:
    model.zero_grad(set_to_none=False)


def zero_one(model: Any) -> None:
    model[0].weight.grad.zero_()


def write_by_the_core(model: Any) -> None:
    import fusedstep

    fusedstep.fused_sgd_step(model[0].weight.grad, torch.ones(33, 9), lr=0.5)


def add_noise(model: Any) -> None:
    for k, p in enumerate(model.parameters()):
        p.grad += torch.randn(p.shape, generator=torch.Generator().manual_seed(k)) * 0.1


CHANGES = {
    f.__name__: f
    for f in (
        *(clip, clip_value, multiply_all, multiply_one, multiply_a_view, multiply_detached),
        *(replace, replace_by_a_copy, remove, zero, zero_one, write_by_the_core),
        add_noise,
    )
}


@pytest.mark.parametrize("change", CHANGES)
def test_gradients_that_change_after_the_backward_pass(change: str) -> None:
    """They are measured again, whatever changed them; under no_grad, as such code runs."""
    twins = Twins()
    for seed in range(2):
        twins.backward(seed)
        with torch.no_grad():
            twins.each(lambda model, _: CHANGES[change](model))
        twins.step()
        twins.zero_grad()


def test_changes_between_two_backward_passes() -> None:
    twins = Twins()
    twins.backward(0)
    with torch.no_grad():
        twins.each(lambda model, _: multiply_one(model))
    twins.backward(1)
    twins.step()


def test_step_under_no_grad_and_in_a_closure() -> None:
    twins = Twins()
    twins.backward(0)
    with torch.no_grad():
        twins.step()
    twins.zero_grad()

    def closure_of(model: Any, opt: Any) -> Callable[[], Any]:
        def closure() -> Any:
            opt.zero_grad()
            loss = loss_of(model, 2)
            loss.backward()
            return loss

        return closure

    twins.each(lambda model, opt: opt.step(closure_of(model, opt)))
    twins.check()


def test_add_param_group(observed: list[int]) -> None:
    """The new parameters are measured from the next backward pass on."""
    twins = Twins()
    twins.backward(0)
    twins.step()
    twins.zero_grad()
    torch.manual_seed(9)
    head = torch.nn.Linear(3, 5)
    heads = [head, copy.deepcopy(head)]
    for model, opt, own in zip(twins.models, twins.opts, heads, strict=True):
        opt.add_param_group({"params": own.parameters(), "lr": 0.5})
        model.append(own)
    del observed[:]
    twins.backward(1)
    assert sorted(observed) == list(range(8))
    twins.step()


def test_load_state_dict_and_copies() -> None:
    """The hooks follow the parameters; a copy of the optimizer has hooks of its own."""
    twins = Twins("Adam")
    twins.backward(0)
    twins.step()
    saved = [copy.deepcopy(opt.state_dict()) for opt in twins.opts]
    twins.each(lambda _, opt: opt.load_state_dict(saved[0]))
    twins.zero_grad()
    twins.backward(1)
    twins.step()
    copied = [copy.deepcopy(pair) for pair in zip(twins.models, twins.opts, strict=True)]
    for model, opt in copied:
        for seed in (2, 3):
            opt.zero_grad()
            loss_of(model, seed).backward()
            opt.step()
    assert equal(copied[0][1], copied[1][1])
    for seed in (2, 3):
        twins.zero_grad()
        twins.backward(seed)
        twins.step()
    assert equal(twins.opts[0], copied[0][1])


def test_add_param_group_that_cannot_be_measured() -> None:
    """It is refused, and nothing has changed."""
    param = torch.nn.Parameter(torch.ones(3))
    opt = ours.SGD([param], lr=0.1, norm_in_backward=True, grad_clip_norm=1.0)
    for _ in range(2):
        with pytest.raises(ValueError, match="norm_in_backward"):
            opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(3) * 1j)]})
        assert len(opt.param_groups) == 1
        param.grad = None
        (3 * param).sum().backward()
        opt.step()
    param.data = torch.ones(6)[::2]
    for _ in range(2):
        with pytest.raises(ValueError, match="norm_in_backward"):
            opt.step()


def test_gradients_that_get_other_memory() -> None:
    """As when a parameter grows after the backward pass; no version counter tells."""
    param = torch.nn.Parameter(torch.ones(4))
    opt = ours.SGD([param], lr=0.1, norm_in_backward=True, grad_clip_norm=1.0)
    param.sum().backward()
    param.data = torch.ones(100_003)
    param.grad.data = torch.full((100_003,), 2.0)
    opt.step()
    assert opt.last.grad_norm == (4.0 * 100_003) ** 0.5


def test_the_core_refuses_sums_of_another_size() -> None:
    param = torch.nn.Parameter(torch.ones(4))
    opt = ours.SGD([param], lr=0.1, grad_clip_norm=1.0)
    param.grad = torch.ones(4)
    opt.step()
    plan, rows = opt._bound.plan, opt._rows(opt._bound)
    plan.observe(0, param.grad)
    param.data = torch.ones(100_003)
    param.grad = torch.ones(100_003)
    with pytest.raises(ValueError, match="size"):
        plan.step(None, rows, ("propagate", "all", None), None, None, True)
    assert torch.equal(param, torch.ones(100_003))


def test_nothing_is_measured_among_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP changes gradients afterwards."""
    from fusedstep.torch import backward

    monkeypatch.setattr(backward, "world_size", lambda: 2)
    param = torch.nn.Parameter(torch.ones(4))
    opt = ours.SGD([param], lr=0.1, norm_in_backward=True, grad_clip_norm=1.0)
    param.sum().backward()
    assert not opt._observer._seen
    param.grad.data *= 3
    opt.step()
    assert opt.last.grad_norm == 6.0


def test_float64_that_needs_a_second_look() -> None:
    """Squares beyond the range of float64: the norm is that of the scaled look."""
    twins = Twins(dtype="float64")
    for factor in (1e200, 1e-200):
        twins.each(lambda m, _, f=factor: (loss_of(m) * f).backward())
        twins.step()
        assert 0 < twins.opts[0].last.grad_norm < float("inf")
        twins.zero_grad()


@pytest.mark.parametrize("policy", ["skip", "raise", "propagate"])
def test_gradients_that_are_not_finite(policy: str) -> None:
    twins = Twins(on_nonfinite=policy)
    before = [p.detach().clone() for p in twins.models[0].parameters()]

    def spoiled(model: Any, _opt: Any) -> None:
        (loss_of(model) + model[2].bias[5] * float("inf")).backward()

    twins.each(spoiled)
    if policy == "raise":
        for opt in twins.opts:
            with pytest.raises(
                FloatingPointError,
                match=r"^param_groups\[0\]\['params'\]\[3\]\.grad holds inf or NaN",
            ):
                opt.step()
    else:
        for opt in twins.opts:
            opt.step()
            assert opt.last.skipped is (policy == "skip")
    if policy != "propagate":
        after = list(twins.models[0].parameters())
        assert all(torch.equal(p, q) for p, q in zip(before, after, strict=True))
        twins.zero_grad()
        twins.backward(1)
        twins.step()


def test_norm_that_is_too_large_skips() -> None:
    twins = Twins(skip_grad_norm=1e-3)
    twins.backward()
    twins.step()
    assert twins.opts[0].last.skipped
    assert twins.opts[0].skipped_steps == 1


def test_scopes() -> None:
    for scope in ("group", "array"):
        twins = Twins(grad_clip_scope=scope)
        for seed in range(2):
            twins.backward(seed)
            twins.step()
            twins.zero_grad()


def test_no_gradient_is_kept() -> None:
    """After a step the optimizer holds none, so that memory is free for the next pass."""
    model = model_of()
    opt = ours.SGD(model.parameters(), lr=0.1, grad_clip_norm=1.0, norm_in_backward=True)
    for _ in range(2):
        loss_of(model).backward()
        grads = [weakref.ref(p.grad) for p in model.parameters()]
        opt.step()
        opt.zero_grad()
        gc.collect()
        assert all(grad() is None for grad in grads)


def test_zero_grad_without_a_step_frees_gradients() -> None:
    """Passes whose gradients are thrown away leave nothing behind."""
    model = model_of()
    opt = ours.SGD(model.parameters(), lr=0.1, grad_clip_norm=1.0, norm_in_backward=True)
    loss_of(model).backward()
    grads = [weakref.ref(p.grad) for p in model.parameters()]
    opt.zero_grad()
    gc.collect()
    assert all(grad() is None for grad in grads)
    loss_of(model).backward()
    opt.step()


def test_hooks_go_with_the_optimizer() -> None:
    """Nothing keeps it alive, and it leaves nothing on the parameters."""
    model = model_of()
    opt = ours.SGD(model.parameters(), lr=0.1, grad_clip_norm=1.0, norm_in_backward=True)
    loss_of(model).backward()
    opt.step()
    hooks = [p._post_accumulate_grad_hooks for p in model.parameters()]
    assert all(len(own) == 1 for own in hooks)
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    assert all(len(own) == 1 for own in hooks)
    gone = weakref.ref(opt)
    del opt
    gc.collect()
    assert gone() is None
    assert all(len(own) == 0 for own in hooks)
    loss_of(model).backward()


def test_two_optimizers_on_one_model() -> None:
    """Each measures for itself."""
    twins = Twins()
    extra = [
        ours.Adam(model.parameters(), lr=0.01, grad_clip_norm=0.1, norm_in_backward=observed)
        for model, observed in zip(twins.models, (True, False), strict=True)
    ]
    for seed in range(2):
        twins.backward(seed)
        twins.step()
        for opt in extra:
            opt.step()
        assert extra[0].last.grad_norm == extra[1].last.grad_norm
        twins.zero_grad()
    assert equal(*extra)


def test_parameters_without_hooks() -> None:
    """Frozen ones, and tensors that require no grad, are measured by the step."""
    params = [torch.nn.Parameter(torch.ones(5)), torch.ones(4)]
    twin = [torch.nn.Parameter(torch.ones(5)), torch.ones(4)]
    opts = [
        ours.SGD(p, lr=0.1, grad_clip_norm=0.5, norm_in_backward=observed)
        for p, observed in ((params, True), (twin, False))
    ]
    for own, opt in zip((params, twin), opts, strict=True):
        own[0].square().sum().backward()
        own[1].grad = torch.ones(4)
        opt.step()
    assert opts[0].last.grad_norm == opts[1].last.grad_norm
    assert equal(*opts)


@pytest.mark.parametrize(
    ("param", "kwargs"),
    [
        (lambda: torch.ones(3, dtype=torch.complex64), {}),
        (lambda: torch.ones(3, 2)[:, 0], {}),
        (lambda: torch.ones(3, dtype=torch.bfloat16), {"master_weights": True}),
    ],
)
def test_refused_where_it_cannot_work(param: Any, kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"norm_in_backward.*leave it out"):
        ours.SGD([torch.nn.Parameter(param())], norm_in_backward=True, **kwargs)


def test_scaled_gradients(counted: list[bool]) -> None:
    """With a scaler that leaves unscaling to the step, norms of scaled gradients are divided."""
    twins = Twins()
    scalers = [torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2) for _ in range(2)]
    for seed in range(4):
        for model, opt, scaler in zip(twins.models, twins.opts, scalers, strict=True):
            scaler.scale(loss_of(model, seed)).backward()
            if seed == 1:
                model[2].bias.grad[3] = float("inf")
            scaler.step(opt)
            scaler.update()
        twins.check()
        assert twins.opts[0].last.skipped is (seed == 1)
        twins.zero_grad()
    assert counted == [True] * 4


@pytest.mark.parametrize("clips", [True, False])
def test_gradients_that_the_scaler_unscales(clips: bool) -> None:
    """`unscale_` moves no version counter; the step is told that it was there."""
    kwargs = {} if clips else {"grad_clip_norm": None, "on_nonfinite": "skip"}
    twins = Twins(**kwargs)
    scalers = [torch.amp.GradScaler("cpu", init_scale=256.0) for _ in range(2)]
    for seed in range(3):
        for model, opt, scaler in zip(twins.models, twins.opts, scalers, strict=True):
            scaler.scale(loss_of(model, seed)).backward()
            if seed != 1:
                version = model[0].weight.grad._version
                scaler.unscale_(opt)
                assert model[0].weight.grad._version == version  # see `Observer`
            scaler.step(opt)
            scaler.update()
        twins.check()
        twins.zero_grad()


def test_a_scaler_that_must_unscale_is_refused() -> None:
    with pytest.raises(ValueError, match=r"norm_in_backward.*fused_unscale=False"):
        ours.SGD(model_of().parameters(), norm_in_backward=True, fused_unscale=False)


# --- one optimizer per parameter, stepping in the backward pass -------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_optimizer_in_backward(name: str) -> None:
    """As torch's tutorial does it: each parameter steps and frees its gradient in a hook."""
    models = [model_of(), model_of()]
    opts = {p: getattr(ours, name)([p], lr=0.05) for p in models[0].parameters()}

    def hook(param: Any) -> None:
        opts[param].step()
        opts[param].zero_grad()

    for param in models[0].parameters():
        param.register_post_accumulate_grad_hook(hook)
    whole = getattr(ours, name)(models[1].parameters(), lr=0.05)
    for seed in range(3):
        for model in models:
            loss_of(model, seed).backward()
        whole.step()
        whole.zero_grad()
        assert all(p.grad is None for p in models[0].parameters())
    assert all(
        torch.equal(p, q) for p, q in zip(models[0].parameters(), parameters_of(whole), strict=True)
    )
