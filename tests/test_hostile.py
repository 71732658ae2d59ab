"""Arrays, exporters and moments that a friendly caller would not think of."""

from __future__ import annotations

import signal
from typing import Any

import fusedstep as fs
import numpy as np
import pytest
from exact import Array


def ones(n: int = 4) -> Array:
    return np.ones(n, np.float32)


@pytest.mark.parametrize("make", [iter, list, tuple])
def test_two_arrays_of_one_name_are_refused(make: Any) -> None:
    a, b = ones(), ones()
    with pytest.raises(ValueError, match=r"'w' occurs twice"):
        fs.fused_sgd_step(make([("w", a), ("w", b)]), {"w": ones()}, lr=0.5)
    assert (a == 1).all()
    assert (b == 1).all()


def test_a_pair_among_other_things_is_no_named_pair() -> None:
    with pytest.raises(TypeError, match=r"params\[0\]\[0\]: expected an array, got 'w'"):
        fs.fused_sgd_step([("w", ones()), ones()], [("w", ones()), ones()], lr=0.5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_gradients_are_judged_although_the_norm_is_given(bad: float) -> None:
    p, g = ones(), ones()
    g[1] = bad
    result = fs.fused_sgd_step(p, g, lr=0.5, grad_norm=4.0, on_nonfinite="skip")
    assert result.skipped
    assert result.grad_norm == 4.0
    assert (p == 1).all()
    with pytest.raises(FloatingPointError, match="grads holds inf or NaN"):
        fs.fused_sgd_step(p, g, lr=0.5, grad_norm=4.0, on_nonfinite="raise")
    result = fs.fused_sgd_step(
        p, ones(), lr=0.5, grad_norm=4.0, grad_clip_norm=1.0, on_nonfinite="skip"
    )
    assert (result.grad_norm, result.clip_coef, result.skipped) == (4.0, 0.25, False)


def test_subclasses_of_masked_arrays_are_refused() -> None:
    class Masked(np.ma.MaskedArray):  # type: ignore[type-arg]
        pass

    for p, g in ((Masked(ones()), ones()), (ones(), Masked(ones()))):
        with pytest.raises(TypeError, match="masked"):
            fs.fused_sgd_step(p, g, lr=0.5)


def test_arrays_of_row_pointers_are_refused() -> None:
    testbuffer = pytest.importorskip("_testbuffer")
    flags = testbuffer.ND_PIL | testbuffer.ND_WRITABLE
    rows = testbuffer.ndarray([1.0] * 6, shape=[2, 3], format="f", flags=flags)
    good = np.ones((2, 3), np.float32)
    for p, g in ((rows, good), (good, rows)):
        with pytest.raises(BufferError, match="pointers to its rows"):
            fs.fused_sgd_step(p, g, lr=0.5)
    assert (good == 1).all()


@pytest.mark.parametrize("nested", [False, True])
def test_an_exporter_that_drops_the_other_arrays(nested: bool) -> None:
    """Everything that a step uses is held before an exporter's code runs."""
    inner: list[Any] = [np.ones(100_000, np.float32)]
    grads = [inner] if nested else inner

    class Dropping:
        def __init__(self) -> None:
            self.array = np.ones(100_000, np.float32)

        def __dlpack__(self, **options: Any) -> Any:
            grads[0] = None
            return self.array.__dlpack__(**options)

    p = Dropping()
    fs.fused_sgd_step([[p]] if nested else [p], grads, lr=0.5)
    assert (p.array == 0.5).all()


def test_an_exporter_that_fails_is_called_once() -> None:
    class Failing:
        calls = 0

        def __dlpack__(self, **_: Any) -> Any:
            Failing.calls += 1
            raise TypeError("out of luck")

    with pytest.raises(TypeError, match=r"params: .*out of luck"):
        fs.fused_sgd_step(Failing(), ones(), lr=0.5)
    assert Failing.calls == 1


def test_views_without_elements_are_fine() -> None:
    wide = np.zeros((3, 4), np.float32)
    result = fs.fused_momentum_step(wide[:, :0], np.zeros((3, 0), np.float32), lr=0.5)
    fs.fused_momentum_step(wide[:, 2:2], np.zeros((3, 0)), **result.state, lr=0.5)


def test_errors_of_a_grad_attribute_come_through() -> None:
    class Interrupting(np.ndarray):
        @property
        def grad(self) -> Any:
            raise KeyboardInterrupt

    opt = fs.SGD([ones().view(Interrupting)], lr=0.5)
    with pytest.raises(KeyboardInterrupt):
        opt.step()


@pytest.mark.framework("torch")
def test_lazily_negated_tensors_are_refused_whatever_their_strides() -> None:
    import torch

    values = (torch.ones(4, dtype=torch.cfloat) * (1 + 2j)).conj().imag
    for negated in (values, values.as_strided((4,), (1,)), torch._neg_view(torch.ones(4))):
        for p, g in ((torch.ones(4), negated), (negated, torch.ones(4))):
            with pytest.raises((BufferError, ValueError), match=r"negated|dense"):
                fs.fused_sgd_step(p, g, lr=0.5)


@pytest.mark.framework("torch")
def test_an_interrupt_during_the_kernels_finds_a_whole_step() -> None:
    """It surfaces in the first Python code after them, when all has been put in place."""
    import torch

    p = torch.zeros(4)
    opt = fs.Momentum([p], lr=0.5)
    real = torch.autograd.graph.increment_version
    from fusedstep import _core, buffers

    def interrupted(arrays: list[Any]) -> None:
        real(arrays)
        signal.raise_signal(signal.SIGINT)

    class Tensor(torch.Tensor):  # a type of its own, that the cache has not seen
        pass

    entry = buffers.producer_of(torch.Tensor)._replace(after_write=interrupted)
    lookup = {Tensor: entry}
    _core.set_producer_lookup(lambda kind: lookup.get(kind) or buffers.producer_of(kind))
    try:
        p = torch.zeros(4).as_subclass(Tensor)
        opt = fs.Momentum([p], lr=0.5)
        with pytest.raises(KeyboardInterrupt):
            opt.step([torch.ones(4)])
    finally:
        _core.set_producer_lookup(buffers.producer_of)
    assert (p == -0.5).all()
    plan = opt._plan
    assert plan is not None
    assert plan.get_progress(0) == (1, 1.0)
    assert len(plan.get_state(0)) == 1
