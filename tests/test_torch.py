"""PyTorch: the oracle of SGD, bit for bit; tensors as buffers; its threads shared."""

from __future__ import annotations

import copy
import functools
from typing import Any

import fusedstep as fs
import numpy as np
import pytest
from subprocesses import run_python

try:
    import torch
except ImportError:  # the marker leaves the tests out, by name
    torch = None

pytestmark = pytest.mark.framework("torch")

STEPS = 50
SIZES = (1, 7, 16, 33, 4099, 16_385)


# --- the bits of torch.optim.SGD --------------------------------------------------------------

SGD_CASES = {
    "plain": {},
    "decay": {"weight_decay": 1e-2},
    "maximize": {"maximize": True},
    "momentum": {"momentum": 0.9},
    "momentum decay": {"momentum": 0.9, "weight_decay": 1e-2},
    "dampening": {"momentum": 0.9, "dampening": 0.3},
    "dampening decay maximize": {
        "momentum": 0.9,
        "dampening": 0.3,
        "weight_decay": 1e-2,
        "maximize": True,
    },
    "unit gain": {"momentum": 0.9, "dampening": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "nesterov decay": {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
    "nesterov decay maximize": {
        "momentum": 0.95,
        "nesterov": True,
        "weight_decay": 5e-4,
        "maximize": True,
    },
}


@functools.cache
def make_gradients(dtype: Any) -> list[list[Any]]:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(n, generator=generator, dtype=dtype) for n in SIZES] for _ in range(STEPS)]


@functools.lru_cache(maxsize=1)
def torch_result(case: str, dtype: Any, foreach: bool) -> tuple[list[Any], list[Any]]:
    """Parameters and momentum buffers of torch.optim.SGD after all steps."""
    params = make_parameters(dtype)
    oracle = torch.optim.SGD(params, lr=0.01, foreach=foreach, **SGD_CASES[case])
    for grads in make_gradients(dtype):
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        oracle.step()
    return params, [oracle.state[p].get("momentum_buffer") for p in params]


def make_parameters(dtype: Any) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(n, generator=generator, dtype=dtype)) for n in SIZES]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("foreach", [False, True], ids=["for-loop", "foreach"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", SGD_CASES)
def test_equal_to_torch_sgd(case: str, dtype: str, foreach: bool) -> None:
    """Parameters and velocity after 50 steps: torch.equal, no tolerance."""
    dtype = getattr(torch, dtype)
    params = make_parameters(dtype)
    opt = fs.SGD(params, lr=0.01, **SGD_CASES[case])
    for grads in make_gradients(dtype):
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        opt.step()
    expected, buffers = torch_result(case, dtype, foreach)
    state = opt.state_dict()["state"]
    for k, (p, q) in enumerate(zip(params, expected, strict=True)):
        assert torch.equal(p, q), SIZES[k]
        if buffers[k] is not None:
            assert torch.equal(state[k]["velocity"], buffers[k]), SIZES[k]


def test_changing_hyper_parameters_equal_to_torch() -> None:
    """As a schedule changes lr, and a user momentum, between steps."""
    theirs, ours = make_parameters(torch.float32), make_parameters(torch.float32)
    oracle = torch.optim.SGD(theirs, lr=0.1, momentum=0.5, nesterov=True)
    opt = fs.SGD(ours, lr=0.1, momentum=0.5, nesterov=True)
    for t, grads in enumerate(make_gradients(torch.float32)):
        for p, q, g in zip(theirs, ours, grads, strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        for groups in (oracle.param_groups, opt.param_groups):
            groups[0]["lr"], groups[0]["momentum"] = 0.1 * 0.97**t, 0.5 + 0.4 * t / STEPS
        oracle.step()
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(theirs, ours, strict=True))


@pytest.mark.usefixtures("isa")
def test_late_gradients_equal_to_torch() -> None:
    """A parameter whose gradient is None at first has its own first step."""
    theirs, ours = make_parameters(torch.float32), make_parameters(torch.float32)
    settings = {"lr": 0.01, "momentum": 0.9, "dampening": 0.5}
    oracle, opt = torch.optim.SGD(theirs, **settings), fs.SGD(ours, **settings)
    for t, grads in enumerate(make_gradients(torch.float32)[:6]):
        for k, (p, q, g) in enumerate(zip(theirs, ours, grads, strict=True)):
            late = t < k % 3
            p.grad, q.grad = (None, None) if late else (g.clone(), g.clone())
        oracle.step()
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(theirs, ours, strict=True))


CHANGES = {
    "momentum comes later": [(0.0, 0.0)] * 3 + [(0.9, 0.5)] * 3,
    "momentum pauses": [(0.9, 0.5)] * 3 + [(0.0, 0.5)] * 2 + [(0.9, 0.5)] * 3,
}


@pytest.mark.parametrize("change", CHANGES)
def test_switching_momentum_equal_to_torch(change: str) -> None:
    """The buffer is made when momentum first applies, undamped, and waits while it does not."""
    theirs, ours = make_parameters(torch.float32), make_parameters(torch.float32)
    oracle, opt = torch.optim.SGD(theirs, lr=0.01), fs.SGD(ours, lr=0.01)
    for (momentum, dampening), grads in zip(
        CHANGES[change], make_gradients(torch.float32), strict=False
    ):
        for p, q, g in zip(theirs, ours, grads, strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        for groups in (oracle.param_groups, opt.param_groups):
            groups[0].update(momentum=momentum, dampening=dampening)
        oracle.step()
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(theirs, ours, strict=True))


# --- tensors as buffers -----------------------------------------------------------------------


def model_and_loss() -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    x, y = torch.randn(64, 7), torch.randn(64, 1)
    return model, lambda: torch.nn.functional.mse_loss(model(x), y)


@pytest.mark.parametrize("named", [False, True])
def test_training_a_module(named: bool) -> None:
    """Parameters that require grad, from a generator, with zero_grad and backward."""
    model, loss = model_and_loss()
    twin, twin_loss = model_and_loss()
    opt = fs.MomentumNesterov(model.named_parameters() if named else model.parameters(), lr=0.05)
    oracle = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    first = loss().item()
    for _ in range(20):
        for optimizer, value in ((opt, loss), (oracle, twin_loss)):
            optimizer.zero_grad()
            value().backward()
            optimizer.step()
    assert loss().item() < 0.9 * first
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    keys = list(opt.state_dict()["state"])
    assert keys == (["0.weight", "0.bias", "2.weight", "2.bias"] if named else [0, 1, 2, 3])


def test_groups_of_a_module() -> None:
    """As torch users write them: generators in group dicts, no decay on biases, step() alone."""
    model, loss = model_and_loss()
    twin, twin_loss = model_and_loss()

    def groups(module: Any) -> list[dict[str, Any]]:
        named = dict(module.named_parameters())
        return [
            {"params": (p for n, p in named.items() if "weight" in n), "weight_decay": 0.1},
            {"params": [p for n, p in named.items() if "bias" in n], "lr": 0.2},
        ]

    opt = fs.SGD(groups(model), lr=0.05, momentum=0.9)
    oracle = torch.optim.SGD(groups(twin), lr=0.05, momentum=0.9)
    for _ in range(5):
        for optimizer, value in ((opt, loss), (oracle, twin_loss)):
            optimizer.zero_grad()
            value().backward()
            optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_deepcopy_with_the_module() -> None:
    model, loss = model_and_loss()
    opt = fs.Momentum(model.parameters(), lr=0.05)
    loss().backward()
    opt.step()
    twin, twin_opt = copy.deepcopy((model, opt))
    for each, optimizer in ((model, opt), (twin, twin_opt)):
        for p in each.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.data_ptr() != q.data_ptr()


def test_state_is_made_by_torch() -> None:
    p = torch.nn.Parameter(torch.ones(3, 4, dtype=torch.bfloat16))
    result = fs.fused_momentum_step(p, torch.ones(3, 4, dtype=torch.bfloat16), lr=0.5)
    velocity = result.state["velocity"]
    assert isinstance(velocity, torch.Tensor)
    assert velocity.dtype == torch.float32
    assert not velocity.requires_grad
    assert p[0, 0].item() == 0.5


def test_autograd_notices_the_write() -> None:
    """The version counter moves, so that a stale graph raises instead of lying."""
    p = torch.nn.Parameter(torch.ones(3))
    velocity = torch.zeros(3)
    loss = (p * p).sum()
    versions = p._version, velocity._version
    fs.fused_momentum_step([p], [torch.ones(3)], [velocity], lr=0.1)
    assert (p._version, velocity._version) > versions
    assert velocity._version > versions[1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_step_that_writes_nothing_leaves_the_version() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    version = p._version
    fs.fused_sgd_step(p, torch.full((3,), float("nan")), lr=0.1, on_nonfinite="skip")
    with pytest.raises(ValueError, match="shape"):
        fs.fused_sgd_step(p, torch.ones(4), lr=0.1)
    assert p._version == version


def test_objects_bump_versions_too() -> None:
    model, loss = model_and_loss()
    opt = fs.SGD(model.parameters(), lr=0.1)
    stale = loss()
    loss().backward()
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_dtypes(dtype: str) -> None:
    """The same bits as on the tensor's memory seen by NumPy."""
    dtype = getattr(torch, dtype)
    p, g = torch.randn(1000).to(dtype), torch.randn(1000).to(dtype)
    expected = (
        (p.double() - (0.5 * g.double()))
        .to(torch.float32 if dtype != torch.float64 else dtype)
        .to(dtype)
    )
    fs.fused_sgd_step(p, g, lr=0.5)
    assert torch.equal(p, expected)


def test_channels_last() -> None:
    """State shares the strides; a contiguous gradient is staged."""
    shape = (4, 3, 5, 6)
    plain = torch.randn(shape)
    p = plain.clone(memory_format=torch.channels_last)
    g = torch.randn(shape)
    for grad in (g, g.clone(memory_format=torch.channels_last)):
        result = fs.fused_momentum_step(p, grad, lr=0.1)
        fs.fused_momentum_step(plain, g, lr=0.1)
        assert result.state["velocity"].stride() == p.stride()
    assert torch.equal(p, plain)
    with pytest.raises(ValueError, match="velocity: expected the strides of params"):
        fs.fused_momentum_step(p, g, torch.zeros(shape), lr=0.1)


def test_non_dense_and_shared_gradients() -> None:
    p, q = torch.zeros(4, 3), torch.zeros(4, 3)
    fs.fused_sgd_step(p, torch.ones(3, 4).t(), lr=1.0)
    fs.fused_sgd_step(q, torch.ones(1).expand(4, 3), lr=1.0)
    assert torch.equal(p, q)


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_gradients_that_require_grad() -> None:
    """create_graph=True leaves such gradients."""
    p = torch.nn.Parameter(torch.ones(3))
    (p**3).sum().backward(create_graph=True)
    assert p.grad.requires_grad
    fs.fused_sgd_step(p, p.grad, lr=0.5)
    assert torch.equal(p.detach(), torch.full((3,), -0.5))


def test_numpy_views_and_storage_offsets() -> None:
    base = torch.zeros(10)
    fs.fused_sgd_step(base[3:6], np.ones(3, np.float32), lr=1.0)
    assert base.tolist() == [0, 0, 0, -1, -1, -1, 0, 0, 0, 0]
    fs.fused_sgd_step(torch.from_numpy(np.ones(3)), torch.ones(3), lr=1.0)
    fs.fused_sgd_step(torch.zeros(0, 3), torch.zeros(0, 3), lr=1.0)
    scalar = torch.tensor(1.0)
    fs.fused_sgd_step(scalar, torch.tensor(1.0), lr=1.0)
    assert scalar.item() == 0.0


def test_lr_tensor() -> None:
    p = torch.zeros(1)
    fs.fused_sgd_step(p, torch.ones(1), lr=torch.tensor(0.25))
    assert p.item() == -0.25


def test_state_dict_round_trip(tmp_path: Any) -> None:
    model, loss = model_and_loss()
    opt = fs.MomentumNesterov(model.parameters(), lr=0.1)
    for _ in range(2):
        opt.zero_grad()
        loss().backward()
        opt.step()
    opt.save(tmp_path / "run.npz")
    fresh = fs.MomentumNesterov(model.parameters(), lr=0.1)
    fresh.load(tmp_path / "run.npz")
    before = opt.state_dict()["state"]
    for key, entry in fresh.state_dict()["state"].items():
        assert isinstance(entry["velocity"], torch.Tensor)
        assert torch.equal(entry["velocity"], before[key]["velocity"])
        assert entry["velocity"].data_ptr() != before[key]["velocity"].data_ptr()


def test_load_state_dict_with_assign_is_noticed() -> None:
    """load_state_dict(assign=True) replaces Parameters; where the dict shows it, we notice."""
    model, loss = model_and_loss()
    params = dict(model.named_parameters())
    opt = fs.SGD(params, lr=0.1)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    params.update(model.named_parameters())
    loss().backward()
    with pytest.raises(ValueError, match="params"):
        opt.step()


# --- tensors that are refused -----------------------------------------------------------------


def refused() -> dict[str, tuple[Any, type[Exception], str]]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.ones(3)
    return {
        "fake": (fake, BufferError, "FakeTensor"),
        "meta": (
            torch.ones(3, device="meta"),
            (BufferError, RuntimeError, TypeError),
            "meta|memory",
        ),
        "sparse": (torch.ones(3).to_sparse(), (BufferError, TypeError), "Tensor.*memory|[Ss]parse"),
        "negated": (
            torch.ones(3, dtype=torch.complex64).conj().imag,
            BufferError,
            "lazily negated",
        ),
        "complex": (torch.ones(3, dtype=torch.complex64), TypeError, "complex64"),
        "conjugated": (
            torch.ones(3, dtype=torch.complex64).conj(),
            (TypeError, BufferError),
            "complex64|conj",
        ),
        "integers": (torch.ones(3, dtype=torch.int64), TypeError, "int64"),
        "float8": (torch.ones(3).to(torch.float8_e4m3fn), TypeError, "dtype"),
        "quantized": (
            torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
            (TypeError, BufferError),
            ".",
        ),
    }


@pytest.mark.parametrize(
    "kind",
    [
        "fake",
        "meta",
        "sparse",
        "negated",
        "complex",
        "conjugated",
        "integers",
        "float8",
        "quantized",
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_refused_tensors(kind: str) -> None:
    """By name, as parameters and as gradients, without a backtrace in the message."""
    tensor, error, text = refused()[kind]
    good = torch.ones(3)
    with pytest.raises(error, match=rf"^params\[1\].*({text})") as caught:
        fs.fused_sgd_step([good, tensor], [torch.ones(3), torch.ones(3)], lr=0.5)
    assert "\n" not in str(caught.value)
    with pytest.raises(error, match=rf"^grads\[1\].*({text})"):
        fs.fused_sgd_step([good, torch.ones(3)], [torch.ones(3), tensor], lr=0.5)
    assert torch.equal(good, torch.ones(3))


def test_expanded_parameters_are_refused() -> None:
    base = torch.ones(1)
    with pytest.raises(ValueError, match="params is not dense"):
        fs.fused_sgd_step(base.expand(3), torch.ones(3), lr=0.5)
    assert base.item() == 1.0


def test_distributed_tensor_is_refused() -> None:
    program = """
        import os, warnings
        warnings.simplefilter("ignore")
        import torch, fusedstep as fs
        import torch.distributed as dist
        from torch.distributed.tensor import DTensor, Shard, init_device_mesh
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        d = DTensor.from_local(torch.ones(3), init_device_mesh("cpu", (1,)), [Shard(0)])
        for args in (([d], [torch.ones(3)]), ([torch.ones(3)], [d])):
            try:
                fs.fused_sgd_step(*args, lr=0.5)
            except BufferError as error:
                print(error)
        assert torch.equal(d.to_local(), torch.ones(3))
        dist.destroy_process_group()
    """
    lines = run_python(program).splitlines()
    assert len(lines) == 2
    for line, name in zip(lines, ("params[0]", "grads[0]"), strict=True):
        assert line.startswith(name)
        assert "DTensor" in line


def test_tied_parameters_are_refused_by_name() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(BufferError, match=r"params\[0\] and params\[1\] overlap"):
        fs.SGD([p, p], lr=0.1)


# --- threads ----------------------------------------------------------------------------------


TWO_LIBRARIES = """
    import re
    import numpy as np
    import {first}
    import {second}
    import torch, fusedstep as fs
    torch.set_num_threads(2)
    fs.set_num_threads(2)
    p = torch.zeros(1 << 20)
    for _ in range(3):
        torch.ones(1 << 20).add_(1).sum().item()
        fs.fused_sgd_step(p, torch.ones(1 << 20), lr=0.1, grad_clip_norm=1.0)
    with open("/proc/self/maps") as maps:
        paths = {{line.split()[-1] for line in maps if re.search("gomp|libomp|iomp", line)}}
    print(len(paths))
    print(fs._core.thread_runtime())
"""


@pytest.mark.parametrize(("first", "second"), [("torch", "fusedstep"), ("fusedstep", "torch")])
def test_one_openmp_runtime(first: str, second: str) -> None:
    """Two copies cost milliseconds per step, so ours uses torch's."""
    count, runtime = run_python(TWO_LIBRARIES.format(first=first, second=second)).splitlines()
    assert count == "1"
    assert runtime.startswith("openmp: ")


def test_thread_count_follows_torch() -> None:
    program = """
        import torch, fusedstep as fs
        torch.set_num_threads(1)
        print(fs.get_num_threads())
        fs.set_num_threads(3)
        print(fs.get_num_threads(), torch.get_num_threads())
    """
    assert run_python(program).split() == ["1", "3", "1"]


@pytest.mark.usefixtures("isa")
def test_caller_that_flushes_denormals() -> None:
    p, q = torch.full((300_003,), 1e-39), torch.full((300_003,), 1e-39)
    g = torch.full((300_003,), 1e-40)
    first = fs.fused_sgd_step(p, g, lr=0.5, grad_clip_norm=1.0)
    assert torch.set_flush_denormal(True)
    try:
        second = fs.fused_sgd_step(q, g, lr=0.5, grad_clip_norm=1.0)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(p, q)
    assert first.grad_norm == second.grad_norm > 0
