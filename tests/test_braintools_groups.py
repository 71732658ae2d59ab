"""Param groups and checkpoints of fusedstep.braintools, where braintools' own have most bugs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import brainstates as bs
import fusedstep as fs
import numpy as np
import pytest
from brainstates import array, state

pytestmark = pytest.mark.framework("braintools")


def grouped(
    module: Any, make: Callable[[Any], Any], dtype: Any = np.float32, **group: Any
) -> tuple[Any, dict[str, Any]]:
    """An optimizer with two groups: a, b and c, d, e."""
    weights = bs.weights(dtype)
    optimizer = make(module)
    optimizer.register_trainable_weights({k: weights[k] for k in "ab"})
    optimizer.add_param_group({k: weights[k] for k in "cde"}, **group)
    return optimizer, weights


def numpy_groups(make: Callable[..., Any], **group: Any) -> tuple[Any, dict[str, Any]]:
    """The same for NumPy arrays."""
    values = bs.values(1, np.float32)
    groups = [{"params": {k: values[k] for k in "ab"}}, {"params": {k: values[k] for k in "cde"}}]
    return make([groups[0], {**groups[1], **group}]), values


# --- groups -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "reference", "group"),
    [
        (
            lambda m: m.Momentum(0.1, 0.8, 0.01, 50.0),
            lambda p: fs.Momentum(p, 0.1, 0.8, weight_decay=0.01, grad_clip_norm=50.0),
            {"lr": 0.03, "weight_decay": 0.2},
        ),
        (
            lambda m: m.MomentumNesterov(0.1, grad_clip_norm=50.0, grad_clip_value=1.5),
            lambda p: fs.MomentumNesterov(p, 0.1, grad_clip_norm=50.0, grad_clip_value=1.5),
            {"momentum": 0.5, "grad_clip_norm": 20.0},
        ),
        (
            lambda m: m.SGD(0.1, on_nonfinite="skip", skip_grad_norm=90.0),
            lambda p: fs.SGD(p, 0.1, on_nonfinite="skip", skip_grad_norm=90.0),
            {"lr": 0.02},
        ),
        (
            lambda m: m.Momentum(0.1, grad_clip_norm=20.0, grad_clip_scope="array"),
            lambda p: fs.Momentum(p, 0.1, grad_clip_norm=20.0, grad_clip_scope="array"),
            {"weight_decay": 0.1},
        ),
    ],
    ids=["momentum", "nesterov", "skip", "each array"],
)
def test_groups_have_the_rule_of_the_class_and_one_clip(
    make: Callable[[Any], Any], reference: Callable[..., Any], group: dict[str, Any]
) -> None:
    """The bits of the objects for NumPy arrays, whose clip spans all groups as well."""
    optimizer, weights = grouped(bs.ours, make, **group)
    expected, values = numpy_groups(reference, **group)
    skipped = 0
    for t in range(8):
        grads = bs.gradients(t)
        optimizer.step(grads)
        numbers = {k: np.asarray(v) for k, v in grads.items()}
        result = expected.step([{k: numbers[k] for k in "ab"}, {k: numbers[k] for k in "cde"}])
        skipped += result.skipped
        for k, value in values.items():
            assert np.asarray(weights[k].value).tobytes() == value.tobytes(), (k, t)
    assert int(optimizer.step_count.value) == 8 - skipped == expected.steps


def test_the_rule_of_a_group() -> None:
    """braintools runs Adam in every added group: a first step of -lr * sign(g)."""
    moved = {}
    for module in (bs.ours, bs.theirs):
        first, second = state(0.0), state(0.0)
        optimizer = module.Momentum(0.5)
        optimizer.register_trainable_weights({"w": first})
        optimizer.add_param_group({"v": second})
        optimizer.step({"w": array(0.25), "v": array(0.25)})
        moved[module] = second.value.tolist()
    assert moved[bs.ours] == [-0.125]
    np.testing.assert_allclose(moved[bs.theirs], [-0.5], rtol=1e-4)


def test_the_clip_of_groups() -> None:
    """braintools clips each group by its own norm; this is one clip, at the norm of all."""
    moved = {}
    for module in (bs.ours, bs.theirs):
        first = state(0.0)
        optimizer = module.SGD(1.0, grad_clip_norm=1.0)
        optimizer.register_trainable_weights({"w": first})
        optimizer.add_param_group({"v": state(0.0)})
        optimizer.step({"w": array(3.0), "v": array(4.0)})
        moved[module] = float(first.value[0])
        if module is bs.ours:
            assert float(optimizer.grad_norm) == 5.0
    assert moved[bs.ours] == pytest.approx(-0.6)
    assert moved[bs.theirs] == pytest.approx(-1.0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_groups_of_adam(dtype: str) -> None:
    """Where braintools' groups are right (its class is Adam, no clip), they are the same."""
    tolerance = {"float32": {"rtol": 1e-4, "atol": 1e-4}, "float64": {"rtol": 1e-12, "atol": 1e-14}}
    with bs.precision(dtype):
        runs = []
        for module in (bs.ours, bs.theirs):
            optimizer, weights = grouped(
                module, lambda m: m.Adam(0.1), np.dtype(dtype), lr=0.01, weight_decay=0.1
            )
            history = []
            for t in range(6):
                optimizer.step(bs.gradients(t, np.dtype(dtype)))
                history.append({k: np.asarray(w.value) for k, w in weights.items()})
            runs.append(history)
    bs.assert_same(runs[0], runs[1], **tolerance[dtype])


def rates(optimizer: Any, epochs: int = 3) -> list[list[float]]:
    rows = []
    for _ in range(epochs):
        rows.append([float(lr) for lr in optimizer.get_last_lr()])
        optimizer.lr_scheduler.step()
    return rows


def test_the_schedule_scales_all_groups() -> None:
    """In braintools the rate of a group never changes then."""
    optimizer, _ = grouped(bs.ours, lambda m: m.SGD(m.StepLR(0.4, 1, 0.5)), lr=0.1)
    assert rates(optimizer) == [[0.4, 0.1], [0.2, 0.05], [0.1, 0.025]]
    follows, _ = grouped(bs.ours, lambda m: m.SGD(m.StepLR(0.4, 1, 0.5)))
    assert rates(follows) == [[0.4, 0.4], [0.2, 0.2], [0.1, 0.1]]
    theirs, _ = grouped(bs.theirs, lambda m: m.SGD(m.StepLR(0.4, 1, 0.5)))
    theirs.lr_scheduler.step()
    assert float(theirs.param_groups[1]["lr"].value) == pytest.approx(0.4)


def test_a_schedule_with_a_rate_for_each_group() -> None:
    optimizer, _ = grouped(bs.ours, lambda m: m.SGD(m.StepLR([0.4, 0.1], 1, 0.5)))
    assert rates(optimizer) == [[0.4, 0.1], [0.2, 0.05], [0.1, 0.025]]
    with pytest.raises(ValueError, match=r"lr: got 0\.3 for group 1, for which .* has 0\.1"):
        grouped(bs.ours, lambda m: m.SGD(m.StepLR([0.4, 0.1], 1, 0.5)), lr=0.3)
    theirs, _ = grouped(bs.theirs, lambda m: m.SGD(m.StepLR([0.4, 0.1], 1, 0.5)), lr=0.3)
    with pytest.raises(AttributeError):  # here braintools' group has a float, and no state
        theirs.lr_scheduler.step()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda m: m.OneCycleLR(2.5, 10), [0.1, 0.04]),
        (lambda m: m.CyclicLR(0.1, 0.5, 2), [0.1, 0.04]),
        (lambda m: m.ReduceLROnPlateau(0.1), [0.1, 0.04]),
        (lambda m: m.PiecewiseConstantSchedule(0.1, [1], [0.3, 0.2]), [0.3, 0.3]),
        (lambda m: m.SequentialLR([m.StepLR(0.1), m.StepLR(0.2)], [3]), [0.1, 0.04]),
        (lambda m: m.ChainedScheduler([m.StepLR(0.1), m.ConstantLR(0.3, 0.5, 9)]), [0.05, 0.02]),
    ],
    ids=["one cycle", "cycles", "plateau", "pieces", "sequence", "chain"],
)
def test_rates_of_groups(make: Callable[[Any], Any], expected: list[float]) -> None:
    """What `lr` of a group is: its `base_lr`."""
    optimizer, _ = grouped(bs.ours, lambda m: m.SGD(make(m)), lr=0.04)
    assert optimizer.get_last_lr() == pytest.approx(expected)


def test_rates_of_groups_in_a_sequence() -> None:
    """The members scale them in the proportion of their own rates."""
    members = [bs.ours.ConstantLR(0.1), bs.ours.StepLR(0.2, 1, 0.5)]
    optimizer, _ = grouped(bs.ours, lambda m: m.SGD(m.SequentialLR(members, [1])), lr=0.04)
    got = rates(optimizer)
    np.testing.assert_allclose(got, [[0.1 / 3, 0.04 / 3], [0.2, 0.08], [0.1, 0.04]])
    with pytest.raises(ValueError, match=r"schedulers\[1\]: expected one base_lr or .* 1, got 2"):
        bs.ours.SequentialLR([bs.ours.StepLR(0.1), bs.ours.StepLR([0.1, 0.2])], [3])


def test_live_rates() -> None:
    optimizer, _ = grouped(bs.ours, lambda m: m.SGD(0.5), lr=0.25)
    first, second = optimizer.param_groups
    assert (first["lr"].value, second["lr"].value, optimizer.current_lr) == (0.5, 0.25, 0.5)
    second["lr"].value = 0.125
    assert optimizer.get_last_lr() == [0.5, 0.125]
    assert "0.125" in repr(second["lr"])
    optimizer.current_lr = 0.0625
    assert first["lr"].value == 0.0625
    with pytest.raises(ValueError, match=r"lr: .*got -1\.0"):
        second["lr"].value = -1.0
    with pytest.raises(TypeError):  # compiled into the step: not to be set
        second["weight_decay"] = 0.1
    assert list(second["params"]) == ["c", "d", "e"]


def test_a_scheduler_of_two_optimizers() -> None:
    """Both follow it, as in braintools, and their groups of the same number have one rate."""
    scheduler = bs.ours.StepLR(0.4, 1, 0.5)
    first, second = (
        grouped(bs.ours, lambda m: m.SGD(scheduler), **g)[0] for g in ({"lr": 0.1}, {})
    )
    assert [rates(o, 1)[0] for o in (first, second)] == [[0.4, 0.1], [0.2, 0.05]]
    assert scheduler.optimizer is second
    first.add_param_group({"v": state(0.0)}, lr=0.3)
    with pytest.raises(ValueError, match=r"lr: got 0\.2 for group 2, for which the scheduler has"):
        second.add_param_group({"v": state(0.0)}, lr=0.2)


def test_another_scheduler() -> None:
    """`lr_scheduler` can be replaced; groups keep the rates that they were given."""
    optimizer, _ = grouped(bs.ours, lambda m: m.SGD(0.5), lr=0.25)
    optimizer.lr_scheduler = bs.ours.StepLR(0.4, 1, 0.5)
    assert rates(optimizer, 2) == [[0.4, 0.25], [0.2, 0.125]]
    scheduler = bs.ours.ExponentialLR([0.3, 0.2], 0.5)
    optimizer.add_scheduler(scheduler)
    assert optimizer.schedulers == [scheduler]
    assert rates(optimizer, 2) == [[0.3, 0.2], [0.15, 0.1]]
    with pytest.raises(TypeError, match="lr_scheduler: expected a scheduler"):
        optimizer.lr_scheduler = fs.StepLR(0.1)


def test_groups_in_compiled_steps() -> None:
    ends = []
    for compiled in (False, True):
        optimizer, weights = grouped(
            bs.ours, lambda m: m.Nadam(m.ExponentialLR(0.1, 0.5), grad_clip_norm=50.0), lr=0.3
        )
        grads = bs.gradients(0)

        def train(optimizer: Any = optimizer, grads: Any = grads) -> None:
            optimizer.step(grads)
            optimizer.lr_scheduler.step()

        step = bs.brainstate.transform.jit(train) if compiled else train
        for _ in range(3):
            step()
        ends.append({k: np.asarray(w.value) for k, w in weights.items()})
    bs.assert_same(ends[:1], ends[1:], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("params", "group", "message"),
    [
        ({"a": 0}, {}, r"params\['a'\]: is registered already"),
        (None, {"on_nonfinite": "skip"}, "on_nonfinite: concerns a step as a whole"),
        (None, {"momentum": 2.0}, r"momentum: .*got 2\.0"),
        (None, {"speed": 2.0}, "speed"),
        (None, {"lr": "fast"}, "lr: .*got 'fast'"),
        (None, {"weight_decay": -1.0}, "weight_decay: .*got -1"),
        ({}, {}, "params: holds no states"),
    ],
)
def test_refused_groups(params: Any, group: dict[str, Any], message: str) -> None:
    weight = state(1.0)
    optimizer = bs.ours.Momentum(0.5)
    optimizer.register_trainable_weights({"a": weight})
    given = {"v": state(2.0)} if params is None else dict.fromkeys(params, weight)
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.add_param_group(given, **group)
    assert len(optimizer.param_groups) == len(optimizer.get_last_lr()) == 1
    assert optimizer.lr_scheduler.base_lrs == [0.5]


@pytest.mark.parametrize(
    ("options", "group"),
    [
        ({"grad_clip_norm": 1.0}, {}),
        ({"skip_grad_norm": 10.0}, {}),
        ({"on_nonfinite": "skip"}, {}),
        ({}, {"grad_clip_norm": 1.0}),
    ],
)
def test_a_scale_of_its_own_does_not_go_with_a_norm_of_all(
    options: dict[str, Any], group: dict[str, Any]
) -> None:
    """The norm is measured before `rescale_grad`, which then has to be the same for all."""
    optimizer = bs.ours.SGD(1.0, **options)
    optimizer.register_trainable_weights({"a": state(0.0)})
    with pytest.raises(ValueError, match="rescale_grad: a group cannot have its own"):
        optimizer.add_param_group({"b": state(0.0)}, rescale_grad=0.1, **group)
    assert len(optimizer.param_groups) == len(optimizer.lr_scheduler.base_lrs) == 1


def test_scales_of_groups() -> None:
    """Their own where nothing asks for a norm; that of the constructor counts in the norm."""
    first, second = state(0.0), state(0.0)
    optimizer = bs.ours.SGD(1.0)
    optimizer.register_trainable_weights({"a": first})
    optimizer.add_param_group({"b": second}, rescale_grad=0.5)
    optimizer.step({"a": array(3.0), "b": array(8.0)})
    assert (first.value.tolist(), second.value.tolist()) == ([-3.0], [-4.0])
    first, second = state(0.0), state(0.0)
    optimizer = bs.ours.SGD(1.0, grad_clip_norm=2.5, rescale_grad=0.5)
    optimizer.register_trainable_weights({"a": first})
    optimizer.add_param_group({"b": second})
    optimizer.step({"a": array(6.0), "b": array(8.0)})
    assert float(optimizer.grad_norm) == 5.0
    assert (first.value.tolist(), second.value.tolist()) == ([-1.5], [-2.0])


def test_a_later_group_may_not_ask_for_a_norm_of_scaled_ones() -> None:
    optimizer = bs.ours.SGD(1.0)
    optimizer.register_trainable_weights({"a": state(0.0)})
    optimizer.add_param_group({"b": state(0.0)}, rescale_grad=0.5)
    with pytest.raises(ValueError, match="rescale_grad: a group cannot have its own"):
        optimizer.add_param_group({"c": state(0.0)}, grad_clip_norm=1.0)


def test_a_constructor_that_raises_leaves_the_scheduler_alone() -> None:
    scheduler = bs.ours.StepLR(0.5)
    optimizer = bs.ours.SGD(scheduler)
    scheduler.current_lrs.value = [0.125]
    with pytest.raises(ValueError, match="momentum"):
        bs.ours.SGD(scheduler, momentum=2.0)
    assert scheduler.optimizer is optimizer
    assert scheduler.current_lrs.value == [0.125]


def test_names_and_scopes_that_do_not_go_together() -> None:
    optimizer = bs.ours.Momentum(0.5, grad_clip_norm=1.0, grad_clip_scope="array", skip_grad_norm=9)
    optimizer.register_trainable_weights({"a": state(1.0)})
    with pytest.raises(ValueError, match='grad_clip_scope="array": with several groups'):
        optimizer.add_param_group({"b": state(1.0)})
    with pytest.raises(ValueError, match="another state is registered as 'a' already"):
        optimizer.register_trainable_weights({"a": state(1.0)})


# --- checkpoints ------------------------------------------------------------------------------


def scheduled(module: Any) -> Any:
    return module.MomentumNesterov(
        module.WarmupCosineSchedule(0.1, 3, 12), 0.9, weight_decay=0.01, grad_clip_norm=50.0
    )


def resumed(make: Callable[[Any], Any], through: Callable[[Any], Any]) -> None:
    """Five steps, a checkpoint, five more: the bits of ten."""

    def train(optimizer: Any, begin: int, end: int) -> None:
        for t in range(begin, end):
            optimizer.step(bs.gradients(t))
            optimizer.lr_scheduler.step()

    optimizer, weights = grouped(bs.ours, make, lr=0.05)
    train(optimizer, 0, 5)
    saved = through(optimizer.state_dict())
    values = {k: w.value for k, w in weights.items()}
    train(optimizer, 5, 10)
    other, others = grouped(bs.ours, make, lr=0.05)
    for k, value in values.items():
        others[k].value = value
    other.load_state_dict(saved)
    train(other, 5, 10)
    for k, w in weights.items():
        assert np.asarray(w.value).tobytes() == np.asarray(others[k].value).tobytes(), k
    assert int(other.step_count.value) == 10


CHECKPOINTED: dict[str, Callable[[Any], Any]] = {
    "nesterov": scheduled,
    "nadam": lambda m: m.Nadam(m.StepLR(0.1, 2, 0.5)),
    "rmsprop": lambda m: m.RMSprop(m.LinearLR(0.1), momentum=0.5, centered=True),
    "sequence": lambda m: m.SGD(m.SequentialLR([m.LinearLR(0.1), m.StepLR(0.2, 2)], [4]), 0.9),
}


@pytest.mark.parametrize("make", CHECKPOINTED.values(), ids=CHECKPOINTED)
def test_resuming(make: Callable[[Any], Any]) -> None:
    resumed(make, lambda saved: saved)


def test_resuming_from_a_file(tmp_path: Any) -> None:
    """Written and read by braintools' own functions."""
    from braintools.file import msgpack_load, msgpack_save

    def through(saved: Any) -> Any:
        path = str(tmp_path / "run.msgpack")
        msgpack_save(path, saved, verbose=False)
        return msgpack_load(path, saved, verbose=False)

    resumed(scheduled, through)


def test_the_schedule_is_in_the_state() -> None:
    """braintools' state is without it: a resumed run starts its schedule from the beginning."""
    current = {}
    for module in (bs.ours, bs.theirs):
        optimizers = []
        for _ in range(2):
            optimizer = module.SGD(module.StepLR(0.4, 1, 0.5))
            optimizer.register_trainable_weights({"w": state(1.0)})
            optimizers.append(optimizer)
        first, second = optimizers
        for _ in range(3):
            first.step({"w": array(1.0)})
            first.lr_scheduler.step()
        second.load_state_dict(first.state_dict())
        second.lr_scheduler.step()
        current[module] = float(second.current_lr)
    assert current[bs.ours] == 0.4 / 16
    assert current[bs.theirs] == pytest.approx(0.2)


def test_entries_are_those_of_braintools_and_the_scheduler() -> None:
    keys = {}
    for module in (bs.ours, bs.theirs):
        optimizer, _ = grouped(module, lambda m: m.Adam(0.1))
        optimizer.step(bs.gradients(0))
        keys[module] = set(optimizer.state_dict())
    assert keys[bs.ours] == keys[bs.theirs] | {"lr_scheduler"}


def test_decays_are_loaded() -> None:
    """In braintools they are read and have no effect."""
    one, other = (bs.ours.SGD(0.5, weight_decay=decay) for decay in (0.5, 0.0))
    weights = [state(1.0), state(1.0)]
    for optimizer, weight in zip((one, other), weights, strict=True):
        optimizer.register_trainable_weights({"w": weight})
    other.load_state_dict(one.state_dict())
    for optimizer in (one, other):
        optimizer.step({"w": array(1.0)})
    assert weights[0].value.tolist() == weights[1].value.tolist() == [0.25]
    assert other.param_groups[0]["weight_decay"] == other.weight_decay == 0.5
    later = state(1.0)
    other.add_param_group({"v": later})  # has the decay of the optimizer
    assert other.param_groups[1]["weight_decay"] == 0.5
    tx, value = other.default_tx(), array(1.0)
    assert tx.step(array(1.0), tx.init(value), value)[0].tolist() == [0.25]


def test_states_that_do_not_fit_change_nothing() -> None:
    optimizer, _ = grouped(bs.ours, scheduled)
    optimizer.step(bs.gradients(0))
    before = optimizer.state_dict()

    def changed(**entries: Any) -> dict[str, Any]:
        return {**before, **entries}

    groups, buffers = before["param_groups"], before["opt_state"]["buffers"]
    short = {"velocity": {**buffers["velocity"], "a": np.zeros(3, np.float32)}}
    double = {"velocity": {**buffers["velocity"], "a": np.zeros(7)}}
    less = {"velocity": {"a": buffers["velocity"]["a"]}}
    for saved, message in (
        ({}, "has no entry 'param_groups'"),
        (changed(param_groups={"0": groups["0"]}), r"param_groups: expected 2 of them"),
        (changed(param_groups={**groups, "1": {**groups["1"], "params": ["x"]}}), "expected the w"),
        (
            changed(param_groups={**groups, "1": {**groups["1"], "weight_decay": -1.0}}),
            "weight_decay: .*got -1",
        ),
        (changed(param_groups_opt_states={}), "param_groups_opt_states: expected 1 of them"),
        (changed(opt_state={}), "has no entry 'buffers'"),
        (
            changed(opt_state={**before["opt_state"], "buffers": less}),
            "not those of this optimizer",
        ),
        (changed(opt_state={**before["opt_state"], "buffers": short}), r"\['a'\].*shape \(7,\)"),
        (changed(opt_state={**before["opt_state"], "buffers": double}), "dtype float32, got .*64"),
        (
            changed(lr_scheduler={**before["lr_scheduler"], "type": "StepLR"}),
            "expected the state of a WarmupCosineSchedule, got that of a StepLR",
        ),
        (changed(lr_scheduler={**before["lr_scheduler"], "last_epoch": -1}), "last_epoch"),
        (
            changed(
                lr_scheduler={**before["lr_scheduler"], "base_lrs": [0.1], "current_lrs": [0.1]}
            ),
            "lr_scheduler: expected 2 base_lrs at least, got 1",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(saved)
        after = optimizer.state_dict()
        assert bs.jax.tree.structure(after) == bs.jax.tree.structure(before)
        leaves = zip(bs.jax.tree.leaves(after), bs.jax.tree.leaves(before), strict=True)
        assert all(np.array_equal(x, y) for x, y in leaves), message


def test_a_state_of_braintools_itself_is_refused() -> None:
    theirs, _ = grouped(bs.theirs, scheduled)
    ours, _ = grouped(bs.ours, scheduled)
    with pytest.raises(ValueError, match="state_dict: has no entry"):
        ours.load_state_dict(theirs.state_dict())


def test_state_without_weights() -> None:
    optimizer = bs.ours.SGD(bs.ours.StepLR(0.4, 1, 0.5))
    optimizer.lr_scheduler.step()
    other = bs.ours.SGD(bs.ours.StepLR(0.4, 1, 0.5))
    other.load_state_dict(optimizer.state_dict())
    assert other.current_lr == 0.2
