"""What is accepted: every door an array can come in by, every layout, every gradient dtype."""

from __future__ import annotations

import array
import gc
import sys
import types
import weakref
from typing import Any

import fusedstep as fs
import numpy as np
import producers
import pytest
from exact import BFLOAT16, DTYPES, Array, mismatch
from fusedstep import _core

SHAPE = (6, 5, 7)


def values(shape: tuple[int, ...] = SHAPE, dtype: Any = np.float32, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def expected_step(param: Array, grad: Array, velocity: Array) -> tuple[Array, Array]:
    """The same step on plain C-contiguous NumPy arrays."""
    p, g, v = (np.array(x, order="C") for x in (param, grad, velocity))
    fs.fused_nesterov_step(p, g, v, lr=0.1, weight_decay=0.01)
    return p, v


def check_step(param: Any, grad: Any, velocity: Any, read: Any = np.asarray) -> None:
    """Steps whatever the arguments are; `read` makes NumPy arrays of them."""
    p, v = expected_step(read(param), read(grad), read(velocity))
    before = read(grad).copy()
    fs.fused_nesterov_step(param, grad, velocity, lr=0.1, weight_decay=0.01)
    assert not mismatch(np.array(read(param), order="C"), p)
    assert not mismatch(np.array(read(velocity), order="C"), v)
    assert not mismatch(read(grad).copy(), before)


# --- NumPy ------------------------------------------------------------------------------------


def fortran(x: Array) -> Array:
    return np.asfortranarray(x)


def transposed(x: Array) -> Array:
    return np.ascontiguousarray(x.transpose(2, 0, 1)).transpose(1, 2, 0)


def negative(x: Array) -> Array:
    return np.ascontiguousarray(x[::-1, :, ::-1])[::-1, :, ::-1]


def strided(x: Array) -> Array:
    wide = np.zeros(tuple(2 * n for n in x.shape), x.dtype)
    wide[::2, 1::2, ::2] = x
    return wide[::2, 1::2, ::2]


LAYOUTS = [np.ascontiguousarray, fortran, transposed, negative, strided]
DENSE = LAYOUTS[:3]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("layout", DENSE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("grad_layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("grad_dtype", [*DTYPES.values(), np.longdouble], ids=str)
def test_layouts(layout: Any, grad_layout: Any, grad_dtype: Any) -> None:
    """Parameters in any dense order with state to match; gradients in any order and dtype."""
    grad = grad_layout(values(seed=1).astype(grad_dtype))
    check_step(layout(values()), grad, layout(values(seed=2)))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("grad_layout", LAYOUTS, ids=lambda f: f.__name__)
def test_layouts_of_several_chunks(grad_layout: Any) -> None:
    """Staging goes chunk by chunk; the borders fall into the middle of rows."""
    shape = (33, 41, 37)
    check_step(values(shape), grad_layout(values(shape, np.float64, 1)), values(shape, seed=2))
    check_step(fortran(values(shape)), grad_layout(values(shape, seed=1)), fortran(values(shape)))


@pytest.mark.usefixtures("isa")
def test_broadcast_gradient() -> None:
    grad = np.broadcast_to(values((5, 1), seed=1), SHAPE)
    check_step(values(), grad, values(seed=2))
    check_step(values(), np.broadcast_to(np.float32(0.5), SHAPE), values(seed=2))


def test_read_only_gradient() -> None:
    grad = values(seed=1)
    grad.flags.writeable = False
    check_step(values(), grad, values(seed=2))


@pytest.mark.usefixtures("isa")
def test_unaligned_arrays() -> None:
    """Not even aligned to their own elements, as in packed records."""
    for dtype in (np.float32, np.float64, np.float16):
        arrays = [producers.unaligned(values((1000,), dtype, k)) for k in range(3)]
        check_step(*arrays)


def test_zero_dimensional() -> None:
    check_step(np.array(1.5, np.float32), np.array(0.5, np.float32), np.array(2.0, np.float32))
    param = np.array(1.5, np.float32)
    fs.fused_sgd_step(param, 0.5, lr=1.0)
    fs.fused_sgd_step(param, np.float64(0.25), lr=1.0)
    fs.fused_sgd_step(param, 1, lr=1.0)
    assert param == -0.25


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), (0, 0)])
def test_zero_size(shape: tuple[int, ...]) -> None:
    """Alone, and between others."""
    empty = np.zeros(shape, np.float32)
    result = fs.fused_momentum_step(empty, empty, lr=0.1, grad_clip_norm=1.0)
    assert result.grad_norm == 0.0
    assert result.state["velocity"].shape == shape
    params = [np.ones(2), np.zeros(shape), np.ones(3)]
    fs.fused_sgd_step(params, [np.ones(2), np.zeros(shape), np.ones(3)], lr=1.0)
    assert not np.concatenate([p.ravel() for p in params]).any()


def test_one_element_dimensions_have_any_stride() -> None:
    base = np.zeros((3, 7), np.float32)
    param = base[1:2, :][:, :, np.newaxis]
    check_step(param, values((1, 7, 1), seed=1), values((1, 7, 1), seed=2))
    assert not base[[0, 2]].any()


def test_numpy_subclass() -> None:
    check_step(
        values().view(producers.Watched), values(seed=1).view(producers.Watched), values(seed=2)
    )


def test_memmap(tmp_path: Any) -> None:
    param = np.memmap(tmp_path / "p", np.float32, "w+", shape=SHAPE)
    param[...] = values()
    check_step(param, values(seed=1), values(seed=2))


@pytest.mark.usefixtures("isa")
def test_bfloat16_of_ml_dtypes() -> None:
    for dtype in (BFLOAT16, np.float32):
        check_step(
            values(dtype=BFLOAT16), values(dtype=BFLOAT16, seed=1), values(dtype=dtype, seed=2)
        )


# --- other producers --------------------------------------------------------------------------


def read_wrapped(x: Any) -> Array:
    return x.array if hasattr(x, "array") else np.asarray(x)


@pytest.mark.parametrize(
    "wrap",
    [
        producers.Versioned,
        producers.Legacy,
        producers.Odd,
        lambda x: producers.Odd(x, versioned=False),
        lambda x: producers.Odd(x, strides=None),
        lambda x: producers.Odd(x, byte_offset=4 * 35, data=x.ctypes.data - 4 * 35),
        lambda x: producers.Odd(x, device=3),
    ],
    ids=["versioned", "legacy", "own versioned", "own legacy", "null strides", "offset", "pinned"],
)
def test_dlpack_producers(wrap: Any) -> None:
    arrays = [wrap(values(seed=k)) for k in range(3)]
    check_step(*arrays, read=read_wrapped)


def test_dlpack_bfloat16() -> None:
    arrays = [producers.Odd(values(dtype=BFLOAT16, seed=k)) for k in range(3)]
    check_step(*arrays, read=read_wrapped)


def test_dlpack_strides() -> None:
    param, velocity = (producers.Odd(fortran(values(seed=k))) for k in (0, 2))
    check_step(param, producers.Odd(negative(values(seed=1))), velocity, read=read_wrapped)


def test_dlpack_zero_size_with_null_data() -> None:
    empty = producers.Odd(np.zeros((0, 3), np.float32), data=None)
    fs.fused_sgd_step([empty], [empty], lr=0.1)


@pytest.mark.parametrize("versioned", [True, False])
def test_dlpack_memory_is_given_back_once(versioned: bool) -> None:
    param, grad, velocity = (producers.Odd(values(seed=k), versioned=versioned) for k in range(3))
    for count in (1, 2):
        fs.fused_nesterov_step(param, grad, velocity, lr=0.1)
        gc.collect()
        assert [x.deleted for x in (param, grad, velocity)] == [count] * 3


def test_dlpack_memory_is_given_back_when_refused() -> None:
    param, grad = producers.Odd(values()), producers.Odd(values((2, 2)))
    with pytest.raises(ValueError, match="shape"):
        fs.fused_sgd_step(param, grad, lr=0.1)
    gc.collect()
    assert (param.deleted, grad.deleted) == (1, 1)


def test_buffer_protocol() -> None:
    def numbers(seed: int) -> array.array:
        return array.array("f", values((1000,), seed=seed).tolist())

    check_step(numbers(0), numbers(1), numbers(2))
    check_step(memoryview(numbers(0)), memoryview(numbers(1)), memoryview(numbers(2)))
    check_step(
        array.array("d", [1.0, 2.0]), array.array("f", [0.5, 1.5]), array.array("d", [0.0, 1.0])
    )


def test_buffer_protocol_of_bytes_as_gradient() -> None:
    grad = memoryview(values((8,), seed=1).tobytes()).cast("f")
    assert grad.readonly
    check_step(values((8,)), grad, values((8,), seed=2))


@pytest.mark.parametrize(
    "module", ["jax._src.array", "jaxlib.xla", "tensorflow.python", "mlx.core"]
)
def test_immutable_producers_are_gradients(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    producers.pretend_imported(monkeypatch)
    grad = producers.of_module(module)(values(seed=1))
    check_step(values(), grad, values(seed=2), read=read_wrapped)


@pytest.mark.framework("jax")
def test_jax_gradients() -> None:
    import jax.numpy as jnp

    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        check_step(values(), jnp.asarray(values(seed=1), dtype), values(seed=2))


def test_producers_mix() -> None:
    param, velocity = values(), producers.Legacy(values(seed=2))
    check_step(param, producers.Versioned(values(seed=1)), velocity, read=read_wrapped)


def test_gradients_may_share_memory() -> None:
    """Tied weights hand out one gradient for two parameters; only outputs need their own memory."""
    grad = values((4,), seed=1)
    a, b, c = values((4,)), values((4,)), values((2,))
    fs.fused_sgd_step([a, b, c], [grad, grad, grad[1:3]], lr=0.1)
    np.testing.assert_array_equal(a, b)


def test_views_of_one_block_do_not_overlap() -> None:
    """The classic flat parameter vector, cut into views, beside its gradient in the same block."""
    flat = values((40,))
    expected = flat[:20] - np.float32(1) * flat[20:]
    fs.fused_sgd_step([flat[:10], flat[10:20]], [flat[20:30], flat[30:]], lr=1.0)
    np.testing.assert_array_equal(flat[:20], expected)


# --- trees ------------------------------------------------------------------------------------


def test_dicts_match_by_key() -> None:
    params = {"a": np.zeros(2), "b": {"c": np.zeros(3)}}
    fs.fused_sgd_step(params, {"b": {"c": np.full(3, 2.0)}, "a": np.full(2, 1.0)}, lr=1.0)
    assert params["a"][0] == -1
    assert params["b"]["c"][0] == -2


def test_iterables() -> None:
    """Generators, dict views, named pairs and tuples are trees too."""
    arrays = {"a": np.zeros(2), "b": np.zeros(3)}
    grads = {"b": np.ones(3), "a": np.ones(2)}
    fs.fused_sgd_step((x for x in arrays.values()), (grads[k] for k in arrays), lr=1.0)
    fs.fused_sgd_step(arrays.values(), [grads[k] for k in arrays], lr=1.0)
    fs.fused_sgd_step(arrays.items(), grads.items(), lr=1.0)
    fs.fused_sgd_step(types.MappingProxyType(arrays), grads, lr=1.0)
    fs.fused_sgd_step(tuple(arrays.values()), (np.ones(2), np.ones(3)), lr=1.0)
    assert np.all(np.concatenate(list(arrays.values())) == -5)


def test_none_gradient_skips_the_parameter() -> None:
    params = {"a": np.ones(2), "b": {"c": np.ones(2), "d": np.ones(2)}}
    result = fs.fused_momentum_step(
        params, {"a": None, "b": {"c": np.ones(2), "d": None}}, lr=1.0, weight_decay=0.5
    )
    assert [params["a"][0], params["b"]["c"][0], params["b"]["d"][0]] == [1, -0.5, 1]
    assert result.state["velocity"]["a"] is None
    assert result.state["velocity"]["b"]["c"][0] == 1.5
    whole = fs.fused_sgd_step(params, {"a": np.ones(2), "b": None}, lr=1.0)
    assert not whole.skipped
    assert params["a"][0] == 0


def test_description_of_arrays() -> None:
    """The private helpers that the Python layer builds on."""
    assert _core.describe(values()) == (SHAPE, "float32")
    assert _core.is_array(producers.Legacy(values()))
    assert not _core.is_array([1.0])
    view = _core.array_view(producers.Versioned(values(dtype=np.float16)))
    assert (view.shape, view.dtype) == (SHAPE, np.float16)
    assert _core.array_view(values(dtype=BFLOAT16)).dtype == np.uint16
    assert _core.read_scalar(np.array([0.25], np.float16)) == 0.25
    assert [p for p, _ in _core.flatten({"a": [values()], "b": values()})] == [("a", 0), ("b",)]


# --- what is held, and for how long -------------------------------------------------------------


def test_nothing_is_held_after_a_call() -> None:
    arrays = [values(seed=k) for k in range(3)]
    counts = [sys.getrefcount(x) for x in arrays]
    for _ in range(3):
        fs.fused_momentum_step(*arrays, lr=0.1)
        fs.sum_squares(arrays)
        with pytest.raises(ValueError, match="shape"):
            fs.fused_momentum_step(arrays[0], arrays[1], np.ones(3, np.float32), lr=0.1)
    assert [sys.getrefcount(x) for x in arrays] == counts


def test_made_state_belongs_to_the_caller() -> None:
    state = fs.fused_momentum_step(values(), values(seed=1), lr=0.1).state
    gone = weakref.ref(state["velocity"].view(producers.Watched))
    assert gone() is None
    watched = values().view(producers.Watched)
    gone = weakref.ref(watched)
    fs.fused_sgd_step(watched, values(seed=1), lr=0.1)
    del watched
    assert gone() is None


def test_exported_buffers_are_released() -> None:
    """An array.array cannot be resized while someone holds its memory."""
    param, grad = array.array("f", [1.0, 2.0]), array.array("f", [1.0, 1.0])
    opt = fs.SGD([param], lr=0.5)
    opt.step([grad])
    grad.append(0.0)
    param.append(3.0)
    assert param.tolist() == [0.5, 1.5, 3.0]


def test_an_optimizer_keeps_its_parameters_and_can_be_collected() -> None:
    param = values().view(producers.Watched)
    opt = fs.Momentum([param], lr=0.1)
    opt.step([values(seed=1)])
    param.opt = opt  # a cycle
    gone = weakref.ref(param)
    del param
    gc.collect()
    assert gone() is not None
    del opt
    gc.collect()
    assert gone() is None


@pytest.mark.usefixtures("isa")
def test_many_dimensions() -> None:
    shape = (1,) * 30 + (3, 2) + (1,) * 30 + (2, 5)
    grad = values(shape, seed=1).transpose(*range(62), 63, 62).copy().transpose(*range(62), 63, 62)
    check_step(values(shape), grad, values(shape, seed=2))
