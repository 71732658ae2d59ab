"""What is refused: with which error, in which words, and that nothing has changed."""
# ruff: noqa: E501 (the words of the messages are data)

from __future__ import annotations

import array
import math
from collections.abc import Callable
from typing import Any

import fusedstep as fs
import ml_dtypes
import numpy as np
import producers
import pytest
from exact import Array

Case = tuple[Callable[[], dict[str, Any]], type[Exception], str]


def ones(*shape: int, dtype: Any = np.float32) -> Array:
    return np.ones(shape or (4,), dtype)


def frozen(x: Array) -> Array:
    x.flags.writeable = False
    return x


def snapshot(tree: Any) -> list[bytes]:
    """The bytes of every array in the arguments."""
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        return [x for item in tree for x in snapshot(item)]
    tree = getattr(tree, "array", tree)
    return [np.asarray(tree).tobytes()] if isinstance(tree, (np.ndarray, array.array)) else []


FLAT = ones(12)
SHARED = ones(4)

# Cases come as `arguments of fused_momentum_step` -> error. Where it helps to see that nothing was
# written, a good array comes first.
PARAMETERS: dict[str, Case] = {
    "lr first": (lambda: {"params": 0.01, "grads": ones()}, TypeError, r"params: got 0\.01; params comes first, write lr=0\.01"),
    "a float": (lambda: {"params": [0.5], "grads": [ones()]}, TypeError, r"params\[0\]: a float cannot be updated in place; use np\.array\(\.\.\., np\.float32\)"),
    "a NumPy scalar": (lambda: {"params": {"a": np.float32(1)}, "grads": {"a": 1.0}}, TypeError, r"params\['a'\]: a .*float32 cannot be updated in place"),
    "a string": (lambda: {"params": [ones(), "weights"], "grads": [ones(), ones()]}, TypeError, r"params\[1\]: expected an array, got 'weights'"),
    "None": (lambda: {"params": [ones(), None], "grads": [ones(), ones()]}, TypeError, r"params\[1\]: expected an array, got None"),
    "an object": (lambda: {"params": [object()], "grads": [ones()]}, TypeError, r"params\[0\]: expected an array, got .*object"),
    "empty list": (lambda: {"params": [], "grads": []}, ValueError, r"params is empty \(an exhausted generator\?\)"),
    "empty dict": (lambda: {"params": {}, "grads": {}}, ValueError, r"params is empty"),
    "exhausted generator": (lambda: {"params": iter(()), "grads": []}, ValueError, r"params is empty \(an exhausted generator\?\)"),
    "integers": (lambda: {"params": ones(dtype=np.int64), "grads": ones()}, TypeError, r"params: dtype int64 .*float32"),
    "int8": (lambda: {"params": ones(dtype=np.int8), "grads": ones()}, TypeError, r"params: dtype int8 .*float32"),
    "complex": (lambda: {"params": ones(dtype=np.complex64), "grads": ones()}, TypeError, r"params: dtype complex64"),
    "bool": (lambda: {"params": ones(dtype=bool), "grads": ones()}, TypeError, r"params: dtype bool"),
    "objects": (lambda: {"params": np.array([None]), "grads": ones(1)}, TypeError, r"params: dtype object"),
    "longdouble": (lambda: {"params": ones(dtype=np.longdouble), "grads": ones()}, TypeError, r"params: dtype longdouble cannot be updated"),
    "float8": (lambda: {"params": ones(dtype=ml_dtypes.float8_e4m3fn), "grads": ones()}, TypeError, r"params: dtype float8_e4m3fn"),
    "big-endian": (lambda: {"params": ones(dtype=">f4"), "grads": ones()}, TypeError, r"params: dtype >f4"),
    "read-only": (lambda: {"params": [ones(), frozen(ones())], "grads": [ones(), ones()]}, BufferError, r"params\[1\] is read-only"),
    "broadcast": (lambda: {"params": np.broadcast_to(np.float32(1), (4,)), "grads": ones()}, BufferError, r"params is read-only"),
    "stride zero": (lambda: {"params": np.lib.stride_tricks.as_strided(ones(), (4,), (0,)), "grads": ones()}, ValueError, r"params is not dense"),
    "gaps": (lambda: {"params": {"w": ones(8)[::2]}, "grads": {"w": ones()}}, ValueError, r"params\['w'\] is not dense"),
    "negative strides": (lambda: {"params": ones()[::-1], "grads": ones()}, ValueError, r"params is not dense"),
    "row slices": (lambda: {"params": ones(4, 6)[:, :5], "grads": ones(4, 5)}, ValueError, r"params is not dense"),
    "masked": (lambda: {"params": np.ma.masked_array(ones(), [0, 1, 0, 0]), "grads": ones()}, TypeError, r"params is a masked array"),
    "same twice": (lambda: {"params": [SHARED, SHARED], "grads": [ones(), ones()]}, BufferError, r"params\[0\] and params\[1\] overlap"),
    "overlapping views": (lambda: {"params": {"a": FLAT[:8], "b": FLAT[4:]}, "grads": {"a": ones(8), "b": ones(8)}}, BufferError, r"params\['a'\] and params\['b'\] overlap"),
    "its own gradient": (lambda: {"params": SHARED, "grads": SHARED}, BufferError, r"params and grads overlap"),
    "gradient of a neighbour": (lambda: {"params": [FLAT[:4], ones()], "grads": [ones(), FLAT[3:7]]}, BufferError, r"params\[0\] and grads\[1\] overlap"),
}  # fmt: skip

GRADIENTS: dict[str, Case] = {
    "shape": (lambda: {"params": {"W1": ones(64, 64)}, "grads": {"W1": ones(64)}}, ValueError, r"grads\['W1'\]: expected shape \(64, 64\) like params\['W1'\], got \(64,\)"),
    "same size, other shape": (lambda: {"params": ones(2, 3), "grads": ones(3, 2)}, ValueError, r"grads: expected shape \(2, 3\) like params, got \(3, 2\)"),
    "broadcastable": (lambda: {"params": ones(2, 3), "grads": ones(1, 3)}, ValueError, r"grads: expected shape \(2, 3\) like params, got \(1, 3\)"),
    "scalar for an array": (lambda: {"params": ones(), "grads": 1.0}, ValueError, r"grads: expected shape \(4,\) like params, got \(\)"),
    "missing": (lambda: {"params": [ones(), ones()], "grads": [ones()]}, TypeError, r"grads: expected a list of 2 like params, got a list of 1"),
    "extra": (lambda: {"params": [ones()], "grads": [ones(), ones()]}, TypeError, r"grads: expected a list of 1 like params, got a list of 2"),
    "missing key": (lambda: {"params": {"a": ones(), "b": ones()}, "grads": {"a": ones()}}, ValueError, r"grads: missing key 'b'"),
    "extra key": (lambda: {"params": {"a": ones()}, "grads": {"a": ones(), "c": ones()}}, ValueError, r"grads: extra key 'c'"),
    "wrong key": (lambda: {"params": {"x": {"a": ones()}}, "grads": {"x": {"b": ones()}}}, ValueError, r"grads\['x'\]: missing key 'a'"),
    "array for a list": (lambda: {"params": [ones()], "grads": ones()}, TypeError, r"grads: expected a list of 1 like params, got an array"),
    "list for an array": (lambda: {"params": ones(), "grads": [ones()]}, TypeError, r"grads: expected an array like params, got a list of 1"),
    "dict for an array": (lambda: {"params": [ones()], "grads": [{"a": ones()}]}, TypeError, r"grads\[0\]: expected an array"),
    "list for a dict": (lambda: {"params": {"a": ones()}, "grads": [ones()]}, TypeError, r"grads: expected a dict of 1 like params, got a list of 1"),
    "None at all": (lambda: {"params": ones(), "grads": None}, TypeError, r"grads: expected arrays like params, got None"),
    "exhausted generator": (lambda: {"params": [ones()], "grads": iter(())}, TypeError, r"grads: expected a list of 1 like params, got a list of 0"),
    "integers": (lambda: {"params": [ones(), ones()], "grads": [ones(), ones(dtype=np.int32)]}, TypeError, r"grads\[1\]: dtype int32"),
    "int8": (lambda: {"params": ones(), "grads": ones(dtype=np.int8)}, TypeError, r"grads: dtype int8"),
    "complex": (lambda: {"params": ones(), "grads": ones(dtype=np.complex128)}, TypeError, r"grads: dtype complex128"),
    "big-endian": (lambda: {"params": ones(), "grads": ones(dtype=">f8")}, TypeError, r"grads: dtype >f8"),
    "a string": (lambda: {"params": ones(), "grads": "g"}, TypeError, r"grads: expected an array, got 'g'"),
    "masked": (lambda: {"params": ones(), "grads": np.ma.masked_array(ones(), [0, 1, 0, 0])}, TypeError, r"grads is a masked array"),
}  # fmt: skip

STATES: dict[str, Case] = {
    "shape": (lambda: {"params": [ones()], "grads": [ones()], "velocity": [ones(3)]}, ValueError, r"velocity\[0\]: expected shape \(4,\) like params\[0\], got \(3,\)"),
    "strides": (lambda: {"params": ones(3, 2), "grads": ones(3, 2), "velocity": np.asfortranarray(ones(3, 2))}, ValueError, r"velocity: expected the strides of params"),
    "read-only": (lambda: {"params": ones(), "grads": ones(), "velocity": frozen(ones())}, BufferError, r"velocity is read-only"),
    "float64 beside float32": (lambda: {"params": ones(), "grads": ones(), "velocity": ones(dtype=np.float64)}, TypeError, r"velocity: dtype float64 does not go with params of dtype float32"),
    "float32 beside float64": (lambda: {"params": ones(dtype=np.float64), "grads": ones(), "velocity": ones()}, TypeError, r"velocity: dtype float32 does not go with params of dtype float64; use float64"),
    "integers": (lambda: {"params": ones(), "grads": ones(), "velocity": ones(dtype=np.int64)}, TypeError, r"velocity: dtype int64"),
    "a float": (lambda: {"params": ones(), "grads": ones(), "velocity": 0.0}, TypeError, r"velocity: a float cannot be updated in place"),
    "the parameter": (lambda: {"params": SHARED, "grads": ones(), "velocity": SHARED}, BufferError, r"params and velocity overlap"),
    "the gradient": (lambda: {"params": ones(), "grads": SHARED, "velocity": SHARED}, BufferError, r"grads and velocity overlap"),
    "missing": (lambda: {"params": [ones(), ones()], "grads": [ones(), ones()], "velocity": [ones()]}, TypeError, r"velocity: expected a list of 2 like params, got a list of 1"),
    "missing key": (lambda: {"params": {"a": ones()}, "grads": {"a": ones()}, "velocity": {}}, ValueError, r"velocity: missing key 'a'"),
    "pair of the private storage": (lambda: {"params": ones(), "grads": ones(), "velocity": (ones(dtype=np.int8), ones(1))}, TypeError, r"velocity"),
}  # fmt: skip

COPIES: dict[str, Case] = {
    "shape": (lambda: {"params": ones(), "grads": ones(), "param_copy": ones(3, dtype=np.float16)}, ValueError, r"param_copy: expected shape \(4,\) like params, got \(3,\)"),
    "float32": (lambda: {"params": ones(), "grads": ones(), "param_copy": ones()}, TypeError, r"param_copy: dtype float32 .*float16 or bfloat16"),
    "of a float64 parameter": (lambda: {"params": ones(dtype=np.float64), "grads": ones(), "param_copy": ones(dtype=np.float16)}, TypeError, r"param_copy: dtype float16 does not go with params of dtype float64"),
    "read-only": (lambda: {"params": ones(), "grads": ones(), "param_copy": frozen(ones(dtype=np.float16))}, BufferError, r"param_copy is read-only"),
    "the gradient": (lambda: {"params": ones(1), "grads": SHARED.view(np.float16)[:1], "param_copy": SHARED.view(np.float16)[:1]}, BufferError, r"overlap"),
    "strides": (lambda: {"params": ones(3, 2), "grads": ones(3, 2), "param_copy": np.asfortranarray(ones(3, 2, dtype=np.float16))}, ValueError, r"param_copy: expected the strides of params"),
}  # fmt: skip

PRODUCERS: dict[str, Case] = {
    "DLPack 2": (lambda: {"params": producers.Odd(ones(), major=2), "grads": ones()}, BufferError, r"params: DLPack version 2"),
    "read-only flag": (lambda: {"params": producers.Odd(ones(), flags=producers.READ_ONLY), "grads": ones()}, BufferError, r"params is read-only"),
    "a copy": (lambda: {"params": producers.Odd(ones(), flags=producers.IS_COPIED), "grads": ones()}, BufferError, r"params"),
    "vectors": (lambda: {"params": producers.Odd(ones(), lanes=4), "grads": ones()}, TypeError, r"params: dtype float32 in vectors"),
    "float8": (lambda: {"params": ones(), "grads": producers.Odd(ones(), code=10)}, TypeError, r"grads: dtype .*10"),
    "unsigned": (lambda: {"params": ones(), "grads": producers.Odd(ones(), code=producers.UINT)}, TypeError, r"grads: dtype uint32"),
    "no memory": (lambda: {"params": producers.Odd(ones(), data=None), "grads": ones()}, BufferError, r"params: a .*Odd without memory of its own"),
    "gradient without memory": (lambda: {"params": ones(), "grads": producers.Odd(ones(), data=None)}, BufferError, r"grads: a .*Odd without memory of its own"),
    "no memory but an offset": (lambda: {"params": producers.Odd(ones(), data=None, byte_offset=64), "grads": ones()}, BufferError, r"params: a .*Odd without memory of its own"),
    "stride zero": (lambda: {"params": producers.Odd(ones(), strides=(0,)), "grads": ones()}, ValueError, r"params is not dense"),
    "on a GPU": (lambda: {"params": producers.Odd(ones(), device=producers.CUDA), "grads": ones()}, RuntimeError, r"params is on cuda:0, which cannot be used"),
    "consumed capsule": (lambda: {"params": producers.Odd(ones(), name=b"used_dltensor_versioned"), "grads": ones()}, BufferError, r"params: __dlpack__ gave no DLPack capsule, or a consumed one"),
    "refuses": (lambda: {"params": producers.Broken(BufferError("donated")), "grads": ones()}, BufferError, r"params: a .*Broken that does not hand out its memory: donated"),
    "fails": (lambda: {"params": ones(), "grads": producers.Broken(RuntimeError("deleted\nbacktrace"))}, TypeError, r"grads: a .*Broken .*: deleted$"),
    "immutable (jax)": (lambda: {"params": producers.of_module("jax._src.array")(ones()), "grads": ones()}, TypeError, r"params is a .*Array, which is immutable"),
    "immutable (tensorflow)": (lambda: {"params": producers.of_module("tensorflow.python")(ones()), "grads": ones()}, TypeError, r"params is a .*immutable"),
    "immutable (mlx)": (lambda: {"params": ones(), "grads": ones(), "velocity": producers.of_module("mlx.core")(ones())}, TypeError, r"velocity is a .*immutable"),
    "read-only legacy NumPy": (lambda: {"params": producers.Legacy(frozen(ones())), "grads": ones()}, BufferError, r"params"),
    "bytes": (lambda: {"params": b"1234", "grads": ones()}, TypeError, r"params"),
    "read-only memoryview": (lambda: {"params": memoryview(b"12345678").cast("f"), "grads": ones(2)}, BufferError, r"params is read-only"),
    "array of integers": (lambda: {"params": array.array("i", [1, 2]), "grads": ones(2)}, TypeError, r"params: dtype 'i' \(buffer protocol\)"),
}  # fmt: skip


def hyper(name: str, value: Any, error: type[Exception], text: str) -> Case:
    return lambda: {"params": ones(), "grads": ones(), name: value}, error, rf"{name}: {text}"


HYPERS: dict[str, Case] = {
    f"{name}={value!r}": hyper(name, value, error, text)
    for name, value, error, text in [
        ("lr", -0.1, ValueError, r"expected .*0.* got -0\.1"),
        ("lr", math.nan, ValueError, r".*got nan"),
        ("lr", math.inf, ValueError, r".*got inf"),
        ("lr", "0.1", TypeError, r".*got '0\.1'"),
        ("lr", None, TypeError, r".*got None"),
        ("lr", True, TypeError, r".*got True"),
        ("momentum", 1.0, ValueError, r".*\[0, 1\).*got 1\.0"),
        ("momentum", -0.1, ValueError, r".*\[0, 1\).*got -0\.1"),
        ("momentum", "0.9", TypeError, r".*got '0\.9'"),
        ("next_momentum", 1.5, ValueError, r".*\[0, 1\).*got 1\.5"),
        ("dampening", 1.5, ValueError, r".*\[0, 1\].*got 1\.5"),
        ("weight_decay", -1e-4, ValueError, r".*got -0\.0001"),
        ("weight_decay", math.inf, ValueError, r".*got inf"),
        ("grad_clip_norm", 0.0, ValueError, r".*> 0.*got 0\.0"),
        ("grad_clip_norm", -1.0, ValueError, r".*> 0.*got -1\.0"),
        ("grad_clip_norm", math.nan, ValueError, r".*got nan"),
        ("grad_clip_value", 0, ValueError, r".*> 0.*got 0"),
        ("grad_clip_value", "1", TypeError, r".*got '1'"),
        ("rescale_grad", math.nan, ValueError, r".*got nan"),
        ("rescale_grad", math.inf, ValueError, r".*got inf"),
        ("grad_norm", -1.0, ValueError, r".*got -1\.0"),
        ("grad_norm", "1", TypeError, r".*got '1'"),
        ("maximize", "yes", TypeError, r".*got 'yes'"),
        ("maximize", 2, ValueError, r".*got 2"),
        ("lr_in_velocity", None, TypeError, r".*got None"),
        ("on_nonfinite", "ignore", ValueError, r".*got 'ignore'"),
        ("on_nonfinite", None, TypeError, r".*got None"),
    ]
}  # fmt: skip

ALL = {
    f"{kind}: {name}": case
    for kind, table in [
        ("params", PARAMETERS),
        ("grads", GRADIENTS),
        ("state", STATES),
        ("param_copy", COPIES),
        ("producer", PRODUCERS),
        ("hyper", HYPERS),
    ]
    for name, case in table.items()
}


@pytest.mark.parametrize("name", ALL)
def test_rejected_call_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    producers.pretend_imported(monkeypatch)
    make, error, pattern = ALL[name]
    arguments = make()
    before = snapshot(arguments)
    with pytest.raises(error, match=pattern) as caught:
        fs.fused_momentum_step(**{"lr": 0.5, **arguments})
    assert snapshot(arguments) == before
    assert "array([" not in str(caught.value)  # never what an array holds
    assert "bug in fusedstep" not in str(caught.value)


@pytest.mark.parametrize("position", ["first", "last"])
def test_one_bad_array_among_many_spoils_the_call(position: str) -> None:
    """Validation is over before the first byte is written, whatever the order."""
    params, grads = [ones() for _ in range(50)], [ones() for _ in range(50)]
    grads[0 if position == "first" else -1] = ones(5)
    before = snapshot([params, grads])
    with pytest.raises(ValueError, match=r"grads\[(0|49)\]: expected shape"):
        fs.fused_momentum_step(params, grads, lr=0.1)
    assert snapshot([params, grads]) == before


def test_lr_is_required() -> None:
    with pytest.raises(TypeError, match="lr"):
        fs.fused_momentum_step(ones(), ones())


def test_hyper_parameters_are_keyword_only() -> None:
    with pytest.raises(TypeError):
        fs.fused_sgd_step(ones(), ones(), 0.1)
    with pytest.raises(TypeError):
        fs.fused_momentum_step(ones(), ones(), ones(), 0.1)


def test_unknown_hyper_parameters_are_named() -> None:
    with pytest.raises(TypeError, match="momentun"):
        fs.fused_momentum_step(ones(), ones(), lr=0.1, momentun=0.9)
    with pytest.raises(TypeError, match="velocity"):
        fs.fused_sgd_step(ones(), ones(), velocity=ones(), lr=0.1)


def test_sum_squares_names_what_it_cannot_read() -> None:
    with pytest.raises(TypeError, match=r"grads\[1\]: dtype int64"):
        fs.sum_squares([ones(), ones(dtype=np.int64)])
    with pytest.raises(TypeError, match=r"grads: expected an array, got 'x'"):
        fs.sum_squares("x")


def test_recursive_tree_is_no_crash() -> None:
    tree: list[Any] = [ones()]
    tree.append(tree)
    with pytest.raises(RecursionError):
        fs.fused_sgd_step(tree, tree, lr=0.1)


def test_too_many_dimensions() -> None:
    wide = producers.Odd(ones(1), shape=(1,) * 65, strides=(1,) * 65)
    with pytest.raises(ValueError, match=r"params has 65 dimensions"):
        fs.fused_sgd_step(wide, ones(1), lr=0.1)


# --- what a tree may do while it is read --------------------------------------------------------


class Meddler(producers.Versioned):
    """Runs something when it is asked for its memory."""

    def __init__(self, values: Array, action: Callable[[], Any]) -> None:
        super().__init__(values)
        self.action = action

    def __dlpack__(self, **options: Any) -> Any:
        self.action()
        return super().__dlpack__(**options)


def test_tree_that_shrinks_while_it_is_read() -> None:
    params: list[Any] = [ones(), ones(), ones()]
    params[0] = Meddler(ones(), params.clear)
    with pytest.raises(RuntimeError, match=r"params.* changed while it was read"):
        fs.fused_sgd_step(params, [ones(), ones(), ones()], lr=0.1)
    tree: dict[str, Any] = {"b": ones()}
    tree = {"a": Meddler(ones(), lambda: tree.pop("b", None)), **tree}
    with pytest.raises(RuntimeError, match=r"params.* changed while it was read"):
        fs.fused_sgd_step(tree, {"a": ones(), "b": ones()}, lr=0.1)


def test_step_inside_a_step() -> None:
    """An exporter that itself takes a step of something else."""
    other, param = ones(), ones()
    meddler = Meddler(ones(), lambda: fs.fused_sgd_step(other, ones(), lr=1.0))
    fs.fused_sgd_step([meddler, param], [ones(), ones()], lr=0.5)
    assert meddler.array[0] == 0.5
    assert param[0] == 0.5
    assert other[0] == 0.0
