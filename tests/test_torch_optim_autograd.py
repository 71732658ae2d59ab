"""Beside autograd: writes are noticed; unusual parameters and gradients work or are refused."""

from __future__ import annotations

import copy
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
    torch,
)

pytestmark = pytest.mark.framework("torch")


def strided() -> Any:
    return torch.randn(5, 3, 2)[..., 0]


def transposed() -> Any:
    return torch.randn(3, 5).t()


def channels_last() -> Any:
    return torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)


def view() -> Any:
    return torch.randn(40)[3:18].view(5, 3)


def complex_one() -> Any:
    return torch.randn(7, dtype=torch.complex64)


def complex_strided() -> Any:
    return torch.randn(7, 2, dtype=torch.complex64)[:, 1]


def plain() -> Any:
    return torch.randn(5, 3)


def scalar() -> Any:
    return torch.randn(())


VALUES = {
    f.__name__: f
    for f in (
        *(plain, scalar, strided, transposed, channels_last, view, complex_one, complex_strided),
    )
}


def make(kind: str) -> Any:
    torch.manual_seed(5)
    return torch.nn.Parameter(VALUES[kind]())


# --- a write after forward is detected --------------------------------------------------------


def stale_backward_raises(param: Any, opt: Any) -> None:
    loss = (param * param).abs().sum()
    param.grad = torch.ones_like(param)
    before = param._version
    opt.step()
    assert param._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("name", FORMS)
def test_a_write_after_forward_is_detected(name: str, kind: str) -> None:
    """Else backward would compute with the new values: a wrong gradient, without a word."""
    param = make(kind)
    opt = getattr(ours, name)([param], lr=0.1)
    for _ in range(2):
        stale_backward_raises(param, opt)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_write_of_a_master_is_detected(dtype: str) -> None:
    param = torch.nn.Parameter(torch.randn(33).to(getattr(torch, dtype)))
    opt = ours.SGD([param], lr=0.1, master_weights=True)
    for _ in range(2):
        stale_backward_raises(param, opt)


def test_all_parameters_and_only_those_are_marked() -> None:
    params = parameters([(3,), (4,), (5,), (0,)])
    opt = ours.SGD(params, lr=0.1, momentum=0.9)
    give_gradients(params, 0)
    params[1].grad = None
    versions = [p._version for p in params]
    opt.step()
    assert params[0]._version > versions[0]
    assert params[2]._version > versions[2]
    assert params[1]._version == versions[1]


def test_a_detached_view_is_marked_too() -> None:
    """`param.detach()` shares the counter, so that a graph over it is guarded as well."""
    param = make("plain")
    leaf = param.detach().requires_grad_()
    loss = (leaf * leaf).sum()
    run(ours.Adam([param], lr=0.1), 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- the same numbers as a plain parameter ----------------------------------------------------


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("name", FORMS)
def test_memory_order_does_not_matter(name: str, kind: str) -> None:
    """Views, strides and complex numbers: the bits of a contiguous twin of real numbers."""
    kwargs = {**FORMS[name][1], "grad_clip_norm": 0.5}
    param = make(kind)
    real = torch.view_as_real(param.detach()) if param.is_complex() else param.detach()
    twin = torch.nn.Parameter(real.clone(memory_format=torch.contiguous_format))
    opt, other = (getattr(ours, name)([p], lr=0.1, **kwargs) for p in (param, twin))
    address = param.data_ptr()
    for step in range(3):
        run(opt, 1, step)
        grad = torch.view_as_real(param.grad) if param.is_complex() else param.grad
        twin.grad = grad.clone(memory_format=torch.contiguous_format)
        other.step()
        if param.dim() > 1:  # the gradient of the parameter's own strides is next
            param.grad = None
    now = torch.view_as_real(param.detach()) if param.is_complex() else param.detach()
    assert torch.equal(now, twin)
    assert param.data_ptr() == address
    assert abs(opt.last.grad_norm - other.last.grad_norm) <= 1e-14 * other.last.grad_norm


def conjugated(grad: Any) -> Any:
    return grad.conj().resolve_conj().conj()


GRADIENTS = {
    "as it is": lambda g: g,
    "strided": lambda g: torch.stack([g, g], -1)[..., 1],
    "transposed": lambda g: g.t().contiguous().t(),
    "double": lambda g: g,
    "of a larger tensor": lambda g: torch.cat([g, g])[: len(g)],
    "reversed twice": lambda g: g.flip(0).flip(0),
}


@pytest.mark.parametrize("kind", GRADIENTS)
def test_gradients_of_any_strides(kind: str) -> None:
    params = [make("plain"), make("plain")]
    opts = [ours.AdamW([p], lr=0.1, grad_clip_norm=0.3) for p in params]
    for step in range(3):
        grad = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        params[0].grad, params[1].grad = grad, GRADIENTS[kind](grad.clone())
        assert torch.equal(params[0].grad, params[1].grad)
        for opt in opts:
            opt.step()
    assert torch.equal(*params)


def test_expanded_gradients() -> None:
    """`loss.sum()` leaves such ones; they are read, as many times as they say."""
    param, twin = make("plain"), make("plain")
    param.grad = torch.full((1, 1), 0.5).expand(5, 3)
    twin.grad = torch.full((5, 3), 0.5)
    opts = [ours.SGD([p], lr=0.1, grad_clip_norm=1.0) for p in (param, twin)]
    for opt in opts:
        opt.step()
    assert torch.equal(param, twin)
    assert opts[0].last.grad_norm == opts[1].last.grad_norm


def test_conjugated_gradients_are_read_as_what_they_are() -> None:
    param, twin = make("complex_one"), make("complex_one")
    grad = torch.randn(7, dtype=torch.complex64)
    param.grad = grad.conj()
    twin.grad = grad.conj().resolve_conj()
    assert param.grad.is_conj()
    for p in (param, twin):
        ours.SGD([p], lr=0.1).step()
    assert torch.equal(param, twin)


def test_negated_gradients() -> None:
    """A lazily negated view: its memory has the other sign."""
    complex_param, twin = make("complex_one"), make("complex_one")
    grad = torch.randn(7, dtype=torch.complex64)
    complex_param.grad, twin.grad = torch._neg_view(grad), -grad
    assert complex_param.grad.is_neg()
    for p in (complex_param, twin):
        ours.SGD([p], lr=0.1).step()
    assert torch.equal(complex_param, twin)
    param, twin = make("plain"), make("plain")
    param.grad = torch.randn(5, 3, dtype=torch.complex64).conj().imag
    twin.grad = param.grad.resolve_neg().clone()
    assert param.grad.is_neg()
    for p in (param, twin):
        ours.SGD([p], lr=0.1).step()
    assert torch.equal(param, twin)


@pytest.mark.parametrize("norm_in_backward", [False, True])
def test_negated_gradients_that_autograd_makes(norm_in_backward: bool) -> None:
    """Of scalars inside complex numbers; torch keeps the view, since one element is dense."""
    results = []
    for module in (ours, torch.optim):
        parts = [torch.nn.Parameter(torch.tensor(value)) for value in (0.5, -0.25)]
        options = {"norm_in_backward": True} if norm_in_backward and module is ours else {}
        opt = module.SGD(parts, lr=0.1, momentum=0.9, **options)
        for _ in range(3):
            opt.zero_grad()
            number = torch.complex(*parts).conj() * torch.tensor(1.0 + 2.0j)
            number.real.sum().backward()
            assert parts[1].grad.is_neg()
            opt.step()
        results.append([p.item() for p in parts])
    assert results[0] == results[1]


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_gradients_of_create_graph() -> None:
    """They require grad themselves; the step reads their values and keeps no graph."""
    param, twin = make("plain"), make("plain")
    (param**3).sum().backward(create_graph=True)
    assert param.grad.requires_grad
    twin.grad = param.grad.detach().clone()
    for p in (param, twin):
        ours.Adam([p], lr=0.1, grad_clip_norm=1.0).step()
    assert torch.equal(param, twin)
    assert param.is_leaf
    assert param.requires_grad


def test_inference_tensors() -> None:
    """A step inside `inference_mode`, and parameters made there."""
    with torch.inference_mode():
        made_there = torch.ones(3)
        made_there.grad = torch.ones(3)
        opt = ours.SGD([made_there], lr=0.1, momentum=0.9)
        opt.step()
    assert torch.equal(made_there, torch.full((3,), 0.9))
    params, twins = parameters([(3,), (4,)]), parameters([(3,), (4,)])
    opt, other = ours.Adam(params), ours.Adam(twins)
    give_gradients(params, 0)
    with torch.inference_mode():
        opt.step()
    run(other, 1)
    run(opt, 1, 1)
    run(other, 1, 1)
    assert equal(opt, other)


def test_a_loop_with_autograd() -> None:
    """The bits of torch.optim.SGD over a model with convolution, embedding and normalisation."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Embedding(11, 8), torch.nn.LayerNorm(8), torch.nn.Flatten(), torch.nn.Linear(40, 3)
    )
    twin = copy.deepcopy(model)
    x, y = torch.randint(11, (16, 5)), torch.randint(3, (16,))
    opt = ours.SGD(model.parameters(), lr=0.3, momentum=0.9, nesterov=True)
    other = torch.optim.SGD(twin.parameters(), lr=0.3, momentum=0.9, nesterov=True)
    losses = []
    for _ in range(5):
        for each, optimizer in ((model, opt), (twin, other)):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(each(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[0::2] == losses[1::2]
    assert losses[-1] < losses[0]
    assert equal(opt, other)


# --- parameters that are one ------------------------------------------------------------------


def test_tied_parameters_are_updated_once() -> None:
    """A parameter twice in the list (torch warns), and a module used twice."""
    params = parameters([(3,), (4,)])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        opt = ours.SGD([params[0], params[1], params[0]], lr=0.1, momentum=0.9)
    other = ours.SGD(parameters([(3,), (4,)]), lr=0.1, momentum=0.9)
    for step in range(2):
        give_gradients(params, step)
        opt.step()
    run(other, 2)
    assert all(torch.equal(p, q) for p, q in zip(params, parameters_of(other), strict=True))
    assert len(opt.state) == 2
    with pytest.warns(UserWarning, match="duplicate parameters"):
        theirs = torch.optim.SGD([params[0], params[1], params[0]], lr=0.1, momentum=0.9)
    saved = opt.state_dict()
    assert saved["param_groups"][0]["params"] == theirs.state_dict()["param_groups"][0]["params"]
    opt.load_state_dict(saved)
    assert len(opt.state) == 2

    linear = torch.nn.Linear(4, 4, bias=False)
    model = torch.nn.Sequential(linear, linear)
    assert len(ours.SGD(model.parameters(), lr=0.1).param_groups[0]["params"]) == 1


def test_parameters_that_share_memory_are_refused_by_name() -> None:
    """Two objects over one memory would be updated twice, in no order."""
    param = make("plain")
    other = torch.nn.Parameter(param.data[1:])
    opt = ours.SGD([make("plain"), param, other], lr=0.1)
    give_gradients(parameters_of(opt), 0)
    values = [p.detach().clone() for p in parameters_of(opt)]
    with pytest.raises(BufferError, match=r"\['params'\]\[1\] and .*\['params'\]\[2\] overlap"):
        opt.step()
    assert all(torch.equal(p, v) for p, v in zip(parameters_of(opt), values, strict=True))


def columns(x: Any) -> list[Any]:
    return [x[:, :2], x[:, 1:3]]


def strided_and_base(x: Any) -> list[Any]:
    return [x, x[:, 1:2]]


def strided_and_row(x: Any) -> list[Any]:
    return [x[:, 1], x[2]]


def real_and_complex(x: Any) -> list[Any]:
    return [x[:, 1], torch.view_as_complex(x.view(3, 2, 2))[:, 0]]


def last_element(x: Any) -> list[Any]:
    return [x[:, 3], x.view(-1)[11:]]


@pytest.mark.parametrize(
    "parts", [columns, strided_and_base, strided_and_row, real_and_complex, last_element]
)
@pytest.mark.parametrize("turned", [False, True])
def test_strided_parameters_that_share_elements_are_refused_by_name(
    parts: Any, turned: bool
) -> None:
    """The core only sees their dense copies, of which the last one would win."""
    x = torch.randn(3, 4)
    params = [torch.nn.Parameter(value) for value in parts(x)]
    opt = ours.SGD([make("strided"), *(params[::-1] if turned else params)], lr=1.0)
    give_gradients(parameters_of(opt), 0)
    values = [p.detach().clone() for p in parameters_of(opt)]
    with pytest.raises(BufferError, match=r"\['params'\]\[1\] and .*\['params'\]\[2\] overlap"):
        opt.step()
    assert all(torch.equal(p, v) for p, v in zip(parameters_of(opt), values, strict=True))


@pytest.mark.parametrize(
    "value",
    [
        lambda: torch.randn(5).unfold(0, 3, 1),
        lambda: torch.randn(30).as_strided((4, 3), (4, 2)).as_strided((4, 3), (2, 4)),
        lambda: torch.randn(9, dtype=torch.complex64).unfold(0, 3, 2),
    ],
)
def test_parameters_whose_elements_share_memory_are_refused(value: Any) -> None:
    param = torch.nn.Parameter(value())
    param.grad = torch.ones(param.shape, dtype=param.dtype)
    before = param.detach().clone()
    with pytest.raises(ValueError, match=r"\['params'\]\[0\].*elements share memory"):
        ours.SGD([param], lr=1.0).step()
    assert torch.equal(param, before)


def test_interleaved_parameters_are_apart() -> None:
    """Columns, every second row, and an empty slice between them: no element is shared."""
    x = torch.randn(6, 4, 3)
    kinds = (lambda y: y[::2, :, 0], lambda y: y[::2, :, 1:], lambda y: y[1::2], lambda y: y[:, :0])
    params = [torch.nn.Parameter(kind(x)) for kind in kinds]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    for some in (params, twins):
        opt = ours.SGD(some, lr=0.1, momentum=0.9)
        for step in range(2):
            give_gradients(some, step)
            opt.step()
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


def test_strided_parameter_that_comes_to_lie_on_another() -> None:
    x = torch.randn(5, 4)
    params = [torch.nn.Parameter(x[:, 0]), torch.nn.Parameter(x[:, 1])]
    opt = ours.SGD(params, lr=0.1, momentum=0.9)
    run(opt, 1)
    params[1].data = x[:, 0]
    with pytest.raises(BufferError, match="overlap"):
        run(opt, 1, 1)


# --- refused by name --------------------------------------------------------------------------


def two_tensor(value: Any) -> Any:
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(value, value.clone())


def fake(value: Any) -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(value.shape)


REFUSED: dict[str, tuple[Any, str]] = {
    "meta": (lambda v: v.to("meta"), "meta"),
    "fake": (fake, "FakeTensor"),
    "wrapper": (two_tensor, "TwoTensor"),
    "quantized": (lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8), "dlpack"),
    "sparse": (lambda v: v.to_sparse(), "sparse_coo"),
    "compressed": (lambda v: v.to_sparse_csr(), "sparse_csr"),
    "integers": (lambda v: v.to(torch.int32), "int32"),
    "float8": (lambda v: v.to(torch.float8_e4m3fn), "dtype"),
    "expanded": (lambda v: v[:1].expand(5, 3), r"expanded.*clone"),
    "conjugated": (lambda v: (v * 1j).conj(), "conjugated.*resolve_conj"),
    "negated": (lambda v: torch._neg_view(v), "negated.*resolve_neg"),
    "a negated part": (lambda v: (v * 1j).conj().imag, "negated.*resolve_neg"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_refused_parameters(kind: str) -> None:
    """Where it stands and what it is, at the first step; nothing was written."""
    change, text = REFUSED[kind]
    good, value = make("plain"), change(torch.randn(5, 3))
    bad = value if kind in {"quantized", "fake"} else torch.nn.Parameter(value, requires_grad=False)
    opt = ours.SGD([{"params": [good]}, {"params": [make("plain"), bad]}], lr=0.1)
    good.grad = torch.ones(5, 3)
    before = good.detach().clone()
    with pytest.raises(
        (BufferError, TypeError, ValueError), match=rf"^param_groups\[1\]\['params'\]\[1\].*{text}"
    ) as caught:
        opt.step()
    assert "\n" not in str(caught.value)
    assert torch.equal(good, before)


@pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning")
def test_half_complex_numbers_are_updated() -> None:
    """complex32 is a pair of float16 numbers; its state is of float32 pairs."""
    value = torch.randn(5, 3).to(torch.complex64).to(torch.complex32)
    param = torch.nn.Parameter(value)
    twin = torch.nn.Parameter(torch.view_as_real(value.clone()))
    opts = [ours.SGD([p], lr=0.1, momentum=0.9) for p in (param, twin)]
    for step in range(2):
        grad = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(step)).half()
        param.grad, twin.grad = torch.view_as_complex(grad), grad
        for opt in opts:
            opt.step()
    assert torch.equal(torch.view_as_real(param.detach()), twin)


@pytest.mark.parametrize("kind", ["assigned", "embedding"])
@pytest.mark.parametrize("observed", [False, True])
def test_sparse_gradients_are_refused_with_their_place(kind: str, observed: bool) -> None:
    model = torch.nn.Embedding(5, 3, sparse=True)
    good = make("plain")
    opt = ours.SGD(
        [{"params": [good]}, {"params": [make("plain"), model.weight]}],
        lr=0.1,
        grad_clip_norm=1.0,
        norm_in_backward=observed,
    )
    if kind == "embedding":
        (model(torch.tensor([1, 2])).sum() + good.sum()).backward()
    else:
        good.grad = torch.ones(5, 3)
        model.weight.grad = torch.ones(5, 3).to_sparse()
    before = good.detach().clone(), model.weight.detach().clone()
    with pytest.raises(
        TypeError, match=r"^param_groups\[1\]\['params'\]\[1\]\.grad is sparse_coo.*SparseAdam"
    ):
        opt.step()
    assert torch.equal(good, before[0])
    assert torch.equal(model.weight, before[1])


def test_a_wrapper_as_gradient_is_refused() -> None:
    param = make("plain")
    param.grad = two_tensor(torch.ones(5, 3))
    before = param.detach().clone()
    with pytest.raises(BufferError, match=r"^param_groups\[0\]\['params'\]\[0\]\.grad.*TwoTensor"):
        ours.SGD([param], lr=0.1).step()
    assert torch.equal(param, before)


def test_parameters_of_a_class_of_the_user() -> None:
    """A subclass of Parameter is one, also as a gradient's class."""

    class Tagged(torch.nn.Parameter):
        pass

    class Tensor(torch.Tensor):
        pass

    param, twin = Tagged(torch.ones(33)), torch.nn.Parameter(torch.ones(33))
    opts = [ours.Adam([p], lr=0.1) for p in (param, twin)]
    for _ in range(2):
        param.grad = torch.ones(33).as_subclass(Tensor)
        twin.grad = torch.ones(33)
        version = param._version
        for opt in opts:
            opt.step()
        assert param._version > version
    assert torch.equal(param, twin)


def test_plain_tensors_and_non_leaves() -> None:
    """Tensors that require no grad can be updated; results of operations cannot."""
    tensor = torch.ones(3)
    tensor.grad = torch.ones(3)
    ours.SGD([tensor], lr=0.5).step()
    assert torch.equal(tensor, torch.full((3,), 0.5))
    with pytest.raises(ValueError, match="non-leaf"):
        ours.SGD([make("plain") * 2])
    with pytest.raises(TypeError, match="one of the params is int"):
        ours.SGD([1])


def test_lazy_parameters() -> None:
    """They get their memory in the first forward pass, after the optimizer was made."""
    model = torch.nn.LazyLinear(3)
    opt = ours.SGD(model.parameters(), lr=0.1)
    model(torch.ones(2, 4)).sum().backward()
    opt.step()
    assert model.weight.shape == (3, 4)
