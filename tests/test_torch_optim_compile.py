"""`torch.compile` around the step: whole graphs, no recompilation, the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch_twins import (
    FORMS,
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

pytestmark = [
    pytest.mark.framework("torch"),
    # the compiler's own
    pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
        "ignore:.*torch.jit.*:DeprecationWarning",
    ),
]

SHAPES = [(4, 3), (33,)]


@pytest.fixture(autouse=True)
def dynamo() -> Iterator[Any]:
    """Without what other tests compiled."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch._dynamo
    torch.set_num_threads(threads)
    torch._dynamo.reset()


def make(name: str = "SGD", dtype: str = "float32", **kwargs: Any) -> Any:
    kwargs = {**FORMS[name][1], "lr": 0.05, **kwargs}
    return getattr(ours, name)(parameters(SHAPES, dtype), **kwargs)


def breaks(dynamo: Any) -> int:
    return sum(dynamo.utils.counters["graph_break"].values())


def graphs(dynamo: Any) -> int:
    return dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", FORMS)
def test_compiled_step(name: str, backend: str, dynamo: Any) -> None:
    """One graph, no break, compiled once, the bits of the plain step; counts, state and results."""
    opt, plain = (make(name, grad_clip_norm=0.5) for _ in range(2))
    step = torch.compile(opt.step, backend=backend, fullgraph=True)
    for k in range(4):
        give_gradients(parameters_of(opt), k)
        step()
        run(plain, 1, k)
        opt.param_groups[0]["lr"] = plain.param_groups[0]["lr"] = 0.05 / (k + 2)
    assert equal(opt, plain)
    assert opt.last.grad_norm == plain.last.grad_norm
    assert opt.last.clip_coef == plain.last.clip_coef
    for p, q in zip(parameters_of(opt), parameters_of(plain), strict=True):
        assert opt.state[p].keys() == plain.state[q].keys()
        assert all(torch.equal(v, plain.state[q][k]) for k, v in opt.state[p].items())
    assert breaks(dynamo) == 0
    assert graphs(dynamo) == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_schedulers_do_not_recompile(backend: str, dynamo: Any) -> None:
    """Hyper-parameters are read when the graph runs.

    torch never traces the wrapper that a scheduler puts around `step`: that break is its own.
    """
    opt, plain = make(momentum=0.9), make(momentum=0.9)
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=9) for o in (opt, plain)]

    def train() -> None:
        opt.step()

    compiled = torch.compile(train, backend=backend)
    for k in range(8):
        give_gradients(parameters_of(opt), k)
        compiled()
        run(plain, 1, k)
        for scheduler in schedulers:
            scheduler.step()
    assert equal(opt, plain)
    assert graphs(dynamo) == 1
    assert breaks(dynamo) == 1
    assert "lr_scheduler.py" in " ".join(dynamo.utils.counters["graph_break"])


def test_inductor(dynamo: Any) -> None:
    """The default backend, around operations that write a parameter and read it afterwards."""
    opt, plain = make("AdamW", grad_clip_norm=0.5), make("AdamW", grad_clip_norm=0.5)

    def body(optimizer: Any) -> Any:
        params = optimizer.param_groups[0]["params"]
        with torch.no_grad():
            params[0].mul_(0.5)
            before = params[0] + 1
            optimizer.step()
            after = params[0] + 1
            params[1].add_(after.sum())
        return before, after

    compiled = torch.compile(lambda: body(opt), fullgraph=True)
    for k in range(3):
        give_gradients(parameters_of(opt), k)
        give_gradients(parameters_of(plain), k)
        for got, expected in zip(compiled(), body(plain), strict=True):
            assert torch.equal(got, expected)
        # a sum has another order in a compiled loop
        assert torch.allclose(*(parameters_of(o)[1] for o in (opt, plain)), rtol=1e-6)
        with torch.no_grad():
            parameters_of(opt)[1].copy_(parameters_of(plain)[1])
    assert torch.equal(*(parameters_of(o)[0] for o in (opt, plain)))
    assert breaks(dynamo) == 0


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_training_step(backend: str, dynamo: Any) -> None:
    """Forward, backward and step in one compiled function; the break is that of backward()."""
    models = []
    for compiled in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 2))
        opt = ours.Adam(model.parameters(), lr=0.05, grad_clip_norm=0.1)
        x = torch.randn(16, 6)

        def train(model: Any = model, opt: Any = opt, x: Any = x) -> Any:
            loss = model(x).square().mean()
            loss.backward()
            opt.step()
            opt.zero_grad()
            return loss

        run_it = torch.compile(train, backend=backend) if compiled else train
        losses = [run_it().item() for _ in range(4)]
        models.append((losses, list(model.parameters())))
        assert losses[-1] < losses[0]
        if compiled:
            reasons = " ".join(map(str, dynamo.utils.counters["graph_break"]))
            assert "fusedstep" not in reasons
    assert models[0][0] == models[1][0]
    assert all(torch.equal(p, q) for p, q in zip(models[0][1], models[1][1], strict=True))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_version_counters(backend: str) -> None:
    """A graph that was made before a compiled step notices it."""
    opt = make()
    step = torch.compile(opt.step, backend=backend)
    param = parameters_of(opt)[0]
    for k in range(2):
        loss = param.square().sum()
        give_gradients(parameters_of(opt), k)
        step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", ["master", "complex", "strided", "missing", "tied"])
def test_unusual_parameters(kind: str, backend: str) -> None:
    """The bits of the plain step."""

    def of(seed: int = 0) -> Any:
        torch.manual_seed(seed)
        params = {
            "master": [torch.randn(33).bfloat16(), torch.randn(4)],
            "complex": [torch.randn(33, dtype=torch.complex64), torch.randn(4)],
            "strided": [torch.randn(33, 2)[:, 0], torch.randn(4)],
        }.get(kind, [torch.randn(33), torch.randn(4)])
        params = [torch.nn.Parameter(p) for p in params]
        if kind == "tied":
            params.append(params[0])
        return params

    opts = []
    for compiled in (True, False):
        params = of()
        if kind == "tied":
            with pytest.warns(UserWarning, match="duplicate"):
                opt = ours.Adam(params, lr=0.1)
        else:
            opt = ours.Adam(params, lr=0.1, master_weights=kind == "master")
        step = torch.compile(opt.step, backend=backend) if compiled else opt.step
        for k in range(3):
            give_gradients(params, k)
            if kind == "missing":
                params[1].grad = None
            step()
        opts.append(opt)
    assert equal(*opts)
    if kind == "master":
        states = [o.state[parameters_of(o)[0]] for o in opts]
        assert torch.equal(*(s["master_param"] for s in states))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_step_that_raises_changes_nothing(backend: str) -> None:
    """Also where the graph works on copies."""
    opt = make("Adam", on_nonfinite="raise")
    step = torch.compile(opt.step, backend=backend)
    give_gradients(parameters_of(opt), 0)
    step()
    before = snapshot(opt)
    give_gradients(parameters_of(opt), 1)
    parameters_of(opt)[1].grad[3] = float("inf")
    with pytest.raises(FloatingPointError, match="holds inf or NaN"):
        step()
    if backend == "aot_eager":  # values go in and out again, which versions tell
        versions = [p._version for p in parameters_of(opt)]
        before = [(p, v) for (p, _), v in zip(before[0], versions, strict=True)], before[1]
    assert unchanged(opt, before)
    give_gradients(parameters_of(opt), 2)
    step()


def test_hooks_and_closures() -> None:
    """They run around a compiled step as around a plain one."""
    opt, seen = make(), []
    param = parameters_of(opt)[0]
    opt.register_step_post_hook(lambda *_: seen.append("post"))

    def closure() -> Any:
        opt.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    step = torch.compile(opt.step, backend="eager")
    first = step(closure).item()
    assert step(closure).item() < first
    assert seen == ["post", "post"]


def test_the_operator() -> None:
    """torch's own checks of a custom operator: schema, fake tensors, functionalisation."""
    opt = make()
    give_gradients(parameters_of(opt), 0)
    params = [p.detach() for p in parameters_of(opt)]
    grads = [p.grad for p in parameters_of(opt)]
    arguments = (opt._handle, [0, 1], params, grads)
    torch.library.opcheck(
        torch.ops.fusedstep.step.default,
        arguments,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_it_is_left_out_of_cuda_graphs_of_the_compiler() -> None:
    """Else hyper-parameters would stay what they were at the capture."""
    assert torch.Tag.cudagraph_unsafe in torch.ops.fusedstep.step.default.tags


def test_an_optimizer_that_is_gone() -> None:
    """A graph does not keep it alive, and says so."""
    opt = make()
    handle, params = opt._handle, [p.detach() for p in parameters_of(opt)]
    del opt
    with pytest.raises(RuntimeError, match=r"optimizer of handle \d+ is gone"):
        torch.ops.fusedstep.step(handle, [0, 1], params, params)


def test_two_optimizers_have_graphs_of_their_own() -> None:
    opts = [make("SGD"), make("Adam"), make("Adam", lr=0.5)]
    plains = [make("SGD"), make("Adam"), make("Adam", lr=0.5)]

    def step(optimizer: Any) -> None:
        optimizer.step()

    compiled = torch.compile(step, backend="aot_eager")
    for k in range(3):
        for opt, plain in zip(opts, plains, strict=True):
            give_gradients(parameters_of(opt), k)
            compiled(opt)
            run(plain, 1, k)
    assert all(equal(opt, plain) for opt, plain in zip(opts, plains, strict=True))
