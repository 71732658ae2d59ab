"""Optimizers of fusedstep.braintools on brainstate: compiled steps, states, donation, refusals."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, NamedTuple

import brainstates as bs
import numpy as np
import pytest
from brainstates import array, state

pytestmark = pytest.mark.framework("braintools")


class Net:
    """A small model; the values of its states are trees."""

    def __init__(self) -> None:
        bs.brainstate.random.seed(3)
        self.layers = [bs.brainstate.nn.Linear(6, 5), bs.brainstate.nn.Linear(5, 2)]
        names = ("first", "second")
        self.states = {
            name: next(iter(layer.states(bs.brainstate.ParamState).values()))
            for name, layer in zip(names, self.layers, strict=True)
        }
        self.x = array(*np.random.default_rng(0).standard_normal(48)).reshape(8, 6)

    def loss(self) -> Any:
        first, second = self.layers
        return bs.jax.numpy.mean(second(bs.jax.numpy.tanh(first(self.x))) ** 2)

    def gradients(self) -> Any:
        return bs.brainstate.transform.grad(self.loss, self.states)()

    def values(self) -> list[Any]:
        return [
            np.asarray(x) for x in bs.jax.tree.leaves({k: s.value for k, s in self.states.items()})
        ]


def trained(module: Any, how: str, steps: int = 12) -> tuple[list[Any], list[int], Any]:
    """A model's weights after each step, how often the program was traced, and the optimizer."""
    net = Net()
    optimizer = module.Adam(module.StepLR(0.1, 3, 0.5), eps=1e-3, grad_clip_norm=0.3)
    optimizer.register_trainable_weights(net.states)
    traces: list[int] = []
    history = []

    def train() -> None:
        traces.append(1)
        optimizer.step(net.gradients())
        if how == "all compiled":
            optimizer.lr_scheduler.step()

    call = train if how == "eager" else bs.brainstate.transform.jit(train)
    for _ in range(steps):
        call()
        if how != "all compiled":
            optimizer.lr_scheduler.step()
        history.append(net.values())
    return history, traces, optimizer


@pytest.mark.parametrize("how", ["eager", "compiled step", "all compiled"])
def test_training(how: str) -> None:
    """braintools' trajectory, however it is run; a new rate compiles nothing anew."""
    expected, _, theirs = trained(bs.theirs, "eager")
    history, traces, optimizer = trained(bs.ours, how)
    for got, want in zip(history, expected, strict=True):
        for mine, oracle in zip(got, want, strict=True):
            np.testing.assert_allclose(mine, oracle, rtol=2e-4, atol=2e-5)
    assert len(traces) == (12 if how == "eager" else 1)
    assert int(optimizer.step_count.value) == theirs.step_count.value == 12
    assert float(optimizer.current_lr) == pytest.approx(float(theirs.current_lr))


def test_training_in_a_loop() -> None:
    """Weights, state and rates are carried through `for_loop`, as braintools' are."""
    expected, _, _ = trained(bs.ours, "all compiled")
    net = Net()
    optimizer = bs.ours.Adam(bs.ours.StepLR(0.1, 3, 0.5), eps=1e-3, grad_clip_norm=0.3)
    optimizer.register_trainable_weights(net.states)

    def body(_: Any) -> Any:
        optimizer.step(net.gradients())
        optimizer.lr_scheduler.step()
        return optimizer.grad_norm

    norms = bs.brainstate.transform.for_loop(body, bs.jax.numpy.arange(12))
    for got, want in zip(net.values(), expected[-1], strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert norms.shape == (12,)
    assert float(norms[-1]) == float(optimizer.grad_norm) > 0


def test_the_same_bits_compiled_and_not() -> None:
    grads = {"w": array(*np.random.default_rng(5).standard_normal(33))}
    bits = []
    for wrap in (lambda f: f, bs.brainstate.transform.jit):
        weight = state(*np.random.default_rng(4).standard_normal(33))
        optimizer = bs.ours.MomentumNesterov(0.1, weight_decay=0.1, grad_clip_norm=1.0)
        optimizer.register_trainable_weights({"w": weight})
        step = wrap(lambda g, optimizer=optimizer: optimizer.step(g))
        for _ in range(3):
            step(grads)
        bits.append(np.asarray(weight.value).tobytes())
    assert bits[0] == bits[1]


def test_a_rate_that_is_set_between_compiled_steps() -> None:
    weight = state(1.0)
    optimizer = bs.ours.SGD(0.5)
    optimizer.register_trainable_weights({"w": weight})
    traces = []

    @bs.brainstate.transform.jit
    def step() -> None:
        traces.append(1)
        optimizer.step({"w": array(1.0)})

    for lr, value in ((0.25, 0.75), (0.5, 0.25)):
        optimizer.current_lr = lr
        step()
        assert weight.value.tolist() == [value]
    optimizer.lr_apply(lambda lr: lr / 4)  # of what the schedule says: 0.5
    step()
    assert weight.value.tolist() == [0.125]
    optimizer.lr_scheduler.step()
    assert optimizer.current_lr == optimizer.base_lr == 0.5
    assert len(traces) == 1


# --- states ---------------------------------------------------------------------------------------


def test_brainstate_sees_all_states() -> None:
    """Weights, buffers, counts, and those of the schedule, which braintools' graph lacks."""
    optimizer = bs.ours.Momentum(bs.ours.ReduceLROnPlateau(0.1))
    optimizer.register_trainable_weights({"w": state(1.0)})
    optimizer.add_param_group({"v": state(2.0)})
    found = {".".join(map(str, key)) for key in bs.brainstate.graph.states(optimizer)}
    assert found == {
        "param_states.w", "param_states.v", "opt_state", "param_groups_opt_states.0", "step_count",
        "_lr_scheduler.last_epoch", "_lr_scheduler.current_lrs", "_lr_scheduler.best",
        "_lr_scheduler.num_bad_epochs", "_lr_scheduler.cooldown_counter",
    }  # fmt: skip


def test_copies_are_independent() -> None:
    weight = state(1.0)
    optimizer = bs.ours.Momentum(bs.ours.StepLR(0.5, 1, 0.5), 0.5)
    optimizer.register_trainable_weights({"w": weight})
    optimizer.step({"w": array(1.0)})
    twin = copy.deepcopy(optimizer)
    twin.lr_scheduler.step()
    twin.step({"w": array(1.0)})
    assert weight.value.tolist() == [0.5]
    assert twin.param_states["w"].value.tolist() == [0.5 - 0.25 * 1.5]
    assert (optimizer.current_lr, float(twin.current_lr)) == (0.5, 0.25)


def test_old_values_stay_unless_donated() -> None:
    """JAX arrays are values: what was read before a step is still there after it."""
    weight = state(1.0, 2.0)
    optimizer = bs.ours.Momentum(0.5)
    optimizer.register_trainable_weights({"w": weight})
    old, old_state = weight.value, optimizer.opt_state.value.velocity["w"]
    optimizer.step({"w": array(1.0, 1.0)})
    assert (old.tolist(), old_state.tolist()) == ([1.0, 2.0], [0.0, 0.0])


def pointers(optimizer: Any) -> list[int]:
    arrays = [optimizer.param_states["w"].value, optimizer.opt_state.value.velocity["w"]]
    return [array.unsafe_buffer_pointer() for array in arrays]


def test_donated_steps_are_in_place() -> None:
    """What brainstate's own `jit` has no way to ask for."""
    weight = bs.brainstate.ParamState(bs.jax.numpy.ones(5000))
    optimizer = bs.ours.Momentum(0.5, donate=True)
    optimizer.register_trainable_weights({"w": weight})
    saved = optimizer.state_dict()
    grads = {"w": bs.jax.numpy.ones(5000)}
    optimizer.step(grads)
    before = pointers(optimizer)
    for _ in range(3):
        old = weight.value
        optimizer.step(grads)
        assert pointers(optimizer) == before
        assert old.is_deleted()
    assert saved["opt_state"]["buffers"]["velocity"]["w"].tolist()[0] == 0.0  # a copy
    optimizer.load_state_dict(saved)
    optimizer.step(grads)
    optimizer.load_state_dict(saved)  # whose arrays are still there


def test_skipped_steps() -> None:
    """`on_nonfinite="skip"` leaves weights, buffers and counts alone."""
    weight = state(1.0, 2.0)
    optimizer = bs.ours.Momentum(0.5, on_nonfinite="skip")
    optimizer.register_trainable_weights({"w": weight})
    optimizer.step({"w": array(np.inf, 1.0)})
    assert weight.value.tolist() == [1.0, 2.0]
    assert (int(optimizer.step_count.value), bool(optimizer.skipped)) == (0, True)
    optimizer.step({"w": array(1.0, 1.0)})
    assert (int(optimizer.step_count.value), bool(optimizer.skipped)) == (1, False)
    assert weight.value.tolist() == [0.5, 1.5]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_gradients_with_a_norm_clip(bad: float) -> None:
    """As in braintools: NaN spoils all, an infinity itself and stops the others."""
    results = []
    for module in (bs.ours, bs.theirs):
        weights = {"w": state(1.0, 2.0), "v": state(3.0)}
        optimizer = module.SGD(0.5, grad_clip_norm=1.0)
        optimizer.register_trainable_weights(weights)
        optimizer.step({"w": array(bad, 1.0), "v": array(1.0)})
        results.append([w.value.tolist() for w in weights.values()])
    np.testing.assert_array_equal(np.concatenate(results[0]), np.concatenate(results[1]))


# --- registration and gradients -------------------------------------------------------------------


def test_trees_of_states() -> None:
    """Nested containers, states that hold trees, shared states; entries of others are ignored."""
    shared, inner = state(1.0), bs.brainstate.ParamState({"w": array(1.0), "b": array(2.0)})
    tree = {"layers": [shared, {"deep": inner}], "tied": shared}
    optimizer = bs.ours.SGD(0.5)
    optimizer.register_trainable_weights(tree)
    assert list(optimizer.param_states) == ["layers.0", "layers.1.deep"]
    deep = {"w": array(1.0), "b": None}
    optimizer.step({"layers": [array(1.0), {"deep": deep}], "other": array(9.0)})
    assert shared.value.tolist() == [0.5]
    assert [x.tolist() for x in (inner.value["w"], inner.value["b"])] == [[0.5], [2.0]]
    optimizer.step({"layers": [None, {"deep": None}]})
    assert shared.value.tolist() == [0.5]


class Pair(NamedTuple):
    w: Any
    b: Any


@dataclasses.dataclass
class Layer:
    w: Any
    b: Any


if bs.jax is not None:
    bs.jax.tree_util.register_dataclass(Layer)


@pytest.mark.parametrize("kind", [Pair, Layer])
def test_trees_with_attributes(kind: Any) -> None:
    first, second = state(1.0), state(2.0)
    optimizer = bs.ours.SGD(0.5)
    optimizer.register_trainable_weights({"layer": kind(first, second)})
    assert list(optimizer.param_states) == ["layer.w", "layer.b"]
    optimizer.step({"layer": kind(array(1.0), None)})
    optimizer.step({"layer": kind(array(1.0), array(2.0))})
    assert (first.value.tolist(), second.value.tolist()) == ([0.0], [1.0])
    with pytest.raises(ValueError, match=r"grads: has no entry 'layer\.w'; pass None"):
        optimizer.step({"layer": {"w": array(1.0), "b": array(2.0)}})
    grads = bs.brainstate.transform.grad(
        lambda: (first.value + second.value).sum(), {"layer": kind(first, second)}
    )()
    optimizer.step(grads)
    assert (first.value.tolist(), second.value.tolist()) == ([-0.5], [0.5])


def test_later_registrations_keep_the_state() -> None:
    """braintools makes the state anew: its velocity is lost, and 0.5 instead of 0.25 comes out."""
    ends = {}
    for module in (bs.ours, bs.theirs):
        first, second = state(1.0), state(1.0)
        optimizer = module.Momentum(0.5, 0.5)
        optimizer.register_trainable_weights({"b": first})
        optimizer.step({"b": array(0.5)})
        optimizer.register_trainable_weights({"a": second, "b": first})
        optimizer.step({"b": array(0.5), "a": array(1.0)})
        ends[module] = (first.value.tolist(), second.value.tolist())
    assert ends[bs.ours] == ([0.75 - 0.5 * 0.75], [0.5])
    assert ends[bs.theirs] == ([0.75 - 0.5 * 0.5], [0.5])


def test_later_registrations_count_their_own_steps() -> None:
    """A weight that comes later begins with the corrections of a first step."""
    first, second = state(1.0), state(1.0)
    optimizer = bs.ours.Nadam(0.1)
    optimizer.register_trainable_weights({"b": first})
    for _ in range(5):
        optimizer.step({"b": array(0.5)})
    optimizer.register_trainable_weights({"a": second})
    optimizer.step({"b": array(0.5), "a": array(1.0)})
    alone = state(1.0)
    other = bs.ours.Nadam(0.1)
    other.register_trainable_weights({"a": alone})
    other.step({"a": array(1.0)})
    assert second.value.tolist() == alone.value.tolist()
    assert optimizer.opt_state.value.leaf_steps.tolist() == [1, 6]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda o: o.register_trainable_weights({"w": array(1.0)}),
            r"\['w'\]: .*brainstate\.State",
        ),
        (lambda o: o.register_trainable_weights({}), "holds no states"),
        (
            lambda o: o.register_trainable_weights({"i": bs.brainstate.ParamState(3)}),
            r"params\['i'\]: expected an array",
        ),
        (
            lambda o: o.register_trainable_weights({"a": {"b": state(1.0)}, "a.b": state(1.0)}),
            r"two states have the same path 'a\.b'",
        ),
        (lambda o: o.step({"w": array(1.0)}), "register_trainable_weights must be called"),
        (lambda o: o.grad_norm, "register_trainable_weights must be called"),
        (lambda o: o.add_param_group({"w": state(1.0)}), "must be called before add_param_group"),
    ],
)
def test_rejections_before_registration(call: Any, message: str) -> None:
    optimizer = bs.ours.Momentum(0.5)
    with pytest.raises((TypeError, ValueError), match=message):
        call(optimizer)
    assert optimizer.param_states == {}
    assert optimizer.param_groups == []


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ({}, r"grads: has no entry 'w'; pass None"),
        ({"w": {"x": 1.0}}, r"grads\['w'\]: expected an array of a floating-point"),
        ({"w": np.ones(3, np.float32)}, r"grads\['w'\]: expected shape \(2,\)"),
        ({"w": np.ones(2, np.int32)}, r"grads\['w'\]: expected an array of a floating-point"),
        (None, "grads: has no entry 'w'"),
    ],
)
def test_gradients_are_checked(grads: Any, message: str) -> None:
    weight = state(1.0, 2.0)
    optimizer = bs.ours.Momentum(0.5)
    optimizer.register_trainable_weights({"w": weight})
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.step(grads)
    assert weight.value.tolist() == [1.0, 2.0]
    assert int(optimizer.step_count.value) == 0


# --- units ----------------------------------------------------------------------------------------


def test_weights_with_units() -> None:
    """As in braintools: mantissas are updated, and gradients have the unit of their weight."""
    import brainunit as u

    results = []
    for module in (bs.ours, bs.theirs):
        weight = bs.brainstate.ParamState(array(1.0, -2.0) * u.mV)
        optimizer = module.MomentumNesterov(0.1, grad_clip_norm=1.0)
        optimizer.register_trainable_weights({"w": weight})

        def loss(weight: Any = weight) -> Any:
            return u.get_mantissa(u.math.sum(weight.value**2))

        for _ in range(3):
            optimizer.step(bs.brainstate.transform.grad(loss, {"w": weight})())
        assert weight.value.unit == u.mV
        results.append(np.asarray(weight.value.mantissa))
    np.testing.assert_allclose(*results, rtol=1e-6)


def test_units_that_do_not_fit_are_refused() -> None:
    import brainunit as u

    weight = bs.brainstate.ParamState(array(1.0, -2.0) * u.mV)
    optimizer = bs.ours.SGD(0.1)
    optimizer.register_trainable_weights({"w": weight})
    for unit in (1 / u.mV, u.volt, None):
        grad = array(1.0, 1.0) if unit is None else array(1.0, 1.0) * unit
        with pytest.raises(ValueError, match=r"grads\['w'\]: .*unit of the weight, mV, got "):
            optimizer.step({"w": grad})
    with pytest.raises(TypeError, match="lr: expected a number"):
        bs.ours.SGD(0.1 * u.mV)
    plain = state(1.0)
    other = bs.ours.SGD(0.1)
    other.register_trainable_weights({"w": plain})
    with pytest.raises(ValueError, match=r"unit of the weight, None, got mV"):
        other.step({"w": array(1.0) * u.mV})
