"""The bridge between conventions: runs begun with another system's formulas go on with our step.

Each formula stands here as its system writes it, in float64, and is not taken from the table that
is tested.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import fusedstep as fs
import numpy as np
import pytest
from exact import Array
from fusedstep.conventions import CONVENTIONS, NOT_NESTEROV

try:
    import torch
except ImportError:  # the marker leaves the tests out, by name
    torch = None

TOLERANCE = 1e-12
MU = 0.9
SIZES = {"W": (5, 7), "b": (3,)}
BEFORE, AFTER = 12, 20

Tree = dict[str, Array]
Gradient = Callable[[Array], Array]
Step = Callable[[Array, Array, Gradient, float, bool], None]


# --- the formulas -------------------------------------------------------------------------------
# x: what the system keeps as parameters; v: its velocity; g(point): the gradient; both in place.


def torch_sgd(x: Array, v: Array, g: Gradient, lr: float, nesterov: bool) -> None:
    grad = g(x)
    v[...] = MU * v + grad
    x -= lr * (grad + MU * v if nesterov else v)


def optax_trace(x: Array, v: Array, g: Gradient, lr: float, nesterov: bool) -> None:
    grad = g(x)
    v[...] = grad + MU * v
    update = grad + MU * v if nesterov else v
    x += -lr * update


def tensorflow1(x: Array, v: Array, g: Gradient, lr: float, nesterov: bool) -> None:
    grad = g(x)
    v[...] = MU * v + grad
    x -= lr * grad + lr * MU * v if nesterov else lr * v


def tensorflowsharp(x: Array, v: Array, g: Gradient, lr: float, nesterov: bool) -> None:
    grad = g(x)
    v[...] = MU * v - grad
    x += lr * (MU * v - grad) if nesterov else lr * v


def chainer_corrected(x: Array, v: Array, g: Gradient, lr: float, nesterov: bool) -> None:
    assert not nesterov
    v[...] = MU * v - g(x)
    x += lr * v


def keras(x: Array, v: Array, g: Gradient, lr: float, nesterov: bool) -> None:
    grad = g(x)
    v[...] = MU * v - lr * grad
    x += MU * v - lr * grad if nesterov else v


def dl4j(x: Array, v: Array, g: Gradient, lr: float, nesterov: bool) -> None:
    assert nesterov
    before = v.copy()
    v[...] = MU * v - lr * g(x)
    x -= MU * before - (1 + MU) * v


def deep_diamond(x: Array, v: Array, g: Gradient, lr: float, nesterov: bool) -> None:
    grad = g(x + MU * v) if nesterov else g(x)
    v[...] = MU * v - lr * grad
    x += v


def caffe(x: Array, v: Array, g: Gradient, lr: float, nesterov: bool) -> None:
    before = v.copy()
    v[...] = MU * v + lr * g(x)
    x -= (1 + MU) * v - MU * before if nesterov else v


def cntk(x: Array, v: Array, g: Gradient, lr: float, nesterov: bool) -> None:
    grad = g(x)
    v[...] = MU * v + (1 - MU) * lr * grad
    x -= MU * v + (1 - MU) * lr * grad if nesterov else v


def cntk_no_unit_gain(x: Array, v: Array, g: Gradient, lr: float, nesterov: bool) -> None:
    grad = g(x)
    v[...] = MU * v + lr * grad
    x -= MU * v + lr * grad if nesterov else v


def pennylane(x: Array, v: Array, g: Gradient, lr: float, nesterov: bool) -> None:
    grad = g(x - MU * v) if nesterov else g(x)
    v[...] = MU * v + lr * grad
    x -= v


def climin(x: Array, v: Array, g: Gradient, lr: float, nesterov: bool) -> None:
    jump = MU * v
    if nesterov:
        x -= jump
        correction = lr * g(x)
        x -= correction
        v[...] = jump + correction
    else:
        v[...] = jump + lr * g(x)
        x -= v


FORMULAS: dict[str, Step] = {
    "torch": torch_sgd,
    "optax": optax_trace,
    "braintools": optax_trace,
    "lucid": torch_sgd,
    "tensorflow1": tensorflow1,
    "tensorflowsharp": tensorflowsharp,
    "chainer_corrected": chainer_corrected,
    "keras": keras,
    "keras2": keras,
    "mxnet": keras,
    "chainer": keras,
    "lasagne": keras,
    "sklearn": keras,
    "dl4j": dl4j,
    "neupy": keras,
    "deep_diamond": deep_diamond,
    "caffe": caffe,
    "caffe2": caffe,
    "cntk": cntk,
    "cntk_no_unit_gain": cntk_no_unit_gain,
    "pennylane": pennylane,
    "climin": climin,
}
HEAVY_BALL = [name for name in FORMULAS if name != "dl4j"]
NESTEROV = [name for name in FORMULAS if name not in {"chainer", "chainer_corrected", "neupy"}]
RUNS = [(name, False) for name in HEAVY_BALL] + [(name, True) for name in NESTEROV]
BASE_POINT = {"deep_diamond": 1, "pennylane": -1, "climin": -1}  # look-ahead: x +- mu v
DECOUPLED = {"keras", "deep_diamond"}

runs = pytest.mark.parametrize(
    ("system", "nesterov"), RUNS, ids=[f"{n} nesterov" if k else n for n, k in RUNS]
)


def changing(t: int) -> float:
    """Down, with a jump up every third step: no other formula follows that."""
    return 0.1 * 0.93**t * (1 + 0.5 * (t % 3 == 1))


def then_constant(t: int) -> float:
    return changing(min(t, BEFORE - 1))


def gradient_at(t: int) -> Gradient:
    """Of a quadratic that moves, so that errors feed back."""
    return lambda x: 0.3 * x + np.sin(np.arange(x.size) + t).reshape(x.shape)


def start() -> tuple[Tree, Tree]:
    rng = np.random.default_rng(0)
    return (
        {name: rng.standard_normal(shape) for name, shape in SIZES.items()},
        {name: np.zeros(shape) for name, shape in SIZES.items()},
    )


class Run:
    """A run of one system: `x` and `v` are what it would store."""

    def __init__(self, system: str, nesterov: bool, lr: Callable[[int], float], wd: float = 0.0):
        self.system, self.nesterov, self.lr, self.wd, self.t = system, nesterov, lr, wd, 0
        self.x, self.v = start()

    def advance(self, steps: int) -> list[Tree]:
        """The points where the gradient would be taken next, after each of the steps."""
        points = []
        for t in range(self.t, self.t + steps):
            for name in SIZES:
                self._step(self.x[name], self.v[name], t)
            points.append(self.points())
        self.t += steps
        return points

    def _step(self, x: Array, v: Array, t: int) -> None:
        gradient, lr = gradient_at(t), self.lr(t)
        if self.system in DECOUPLED:
            grad = gradient(x)
            x -= lr * self.wd * x
            fixed = (lambda _: grad) if self.wd else gradient
            FORMULAS[self.system](x, v, fixed, lr, self.nesterov)
        else:
            coupled = lambda point: gradient(point) + self.wd * point  # noqa: E731
            FORMULAS[self.system](x, v, coupled, lr, self.nesterov)

    def points(self) -> Tree:
        sign = BASE_POINT.get(self.system, 0) * self.nesterov
        return {name: self.x[name] + sign * MU * self.v[name] for name in SIZES}

    def arguments(self) -> dict[str, Any]:
        """What `from_convention` needs to know about it."""
        moved = self.system in BASE_POINT and self.nesterov
        return {
            "nesterov": self.nesterov,
            "momentum": MU,
            **({"params": self.x} if moved else {}),
        }


def follow(run: Run, velocity: Any, options: dict[str, Any], lr: Callable[[int], float]) -> Any:
    """Our functional step from `run.x` on; yields the parameters after each step."""
    function = fs.fused_nesterov_step if run.nesterov else fs.fused_momentum_step
    params, state = run.x, {"velocity": velocity}
    for t in range(run.t, run.t + AFTER):
        grads = {name: gradient_at(t)(x) for name, x in params.items()}
        state = function(params, grads, **state, lr=lr(t), **options).state
        yield params


def distance(got: Tree, expected: Tree) -> float:
    """Largest difference, relative to the largest element."""
    scale = max(float(np.max(np.abs(x))) for x in expected.values())
    return max(float(np.max(np.abs(got[n] - expected[n]))) for n in SIZES) / scale


def fork(run: Run) -> tuple[Run, list[Tree]]:
    """The run after its first part, and how its system goes on from there."""
    run.advance(BEFORE)
    theirs = Run(run.system, run.nesterov, run.lr, run.wd)
    theirs.x = {name: x.copy() for name, x in run.x.items()}
    theirs.v = {name: v.copy() for name, v in run.v.items()}
    theirs.t = run.t
    return run, theirs.advance(AFTER)


# --- continued runs -----------------------------------------------------------------------------


def test_every_system_has_a_formula_here() -> None:
    assert set(FORMULAS) == set(CONVENTIONS)
    assert {name for name, row in CONVENTIONS.items() if row.formula} == set(HEAVY_BALL)
    assert {name for name, row in CONVENTIONS.items() if row.nesterov} == set(NESTEROV)


@pytest.mark.parametrize("lr", [changing, lambda _: 0.05], ids=["changing lr", "constant lr"])
@runs
def test_run_goes_on(system: str, nesterov: bool, lr: Callable[[int], float]) -> None:
    """The system's own form needs no learning rate, and follows every change of it."""
    run, expected = fork(Run(system, nesterov, lr))
    velocity, options = fs.from_convention(system, run.v, **run.arguments())
    for k, params in enumerate(follow(run, velocity, options, lr)):
        assert distance(params, expected[k]) <= TOLERANCE, k


@runs
def test_run_goes_on_in_the_other_form(system: str, nesterov: bool) -> None:
    """The learning rate may have changed before; from here on it stays what it was last."""
    run, expected = fork(Run(system, nesterov, then_constant))
    other = not CONVENTIONS[system].lr_inside
    velocity, options = fs.from_convention(
        system, run.v, lr=then_constant(BEFORE - 1), lr_in_velocity=other, **run.arguments()
    )
    assert options["lr_in_velocity"] is other
    for k, params in enumerate(follow(run, velocity, options, then_constant)):
        assert distance(params, expected[k]) <= TOLERANCE, k


@runs
def test_the_other_form_differs_when_lr_changes(system: str, nesterov: bool) -> None:
    """Why the default keeps the system's form; and that the trajectories here can tell."""
    run, expected = fork(Run(system, nesterov, changing))
    other = not CONVENTIONS[system].lr_inside
    velocity, options = fs.from_convention(
        system, run.v, lr=changing(BEFORE - 1), lr_in_velocity=other, **run.arguments()
    )
    *_, last = follow(run, velocity, options, changing)
    assert distance(last, expected[-1]) > 1e-4


DECAYING = ("torch", "keras", "mxnet", "caffe", "cntk", "tensorflowsharp")


@pytest.mark.parametrize(
    ("system", "nesterov"),
    [(name, kind) for name in DECAYING for kind in (False, True)] + [("deep_diamond", False)],
)
def test_run_goes_on_with_decay(system: str, nesterov: bool) -> None:
    """The options have the kind of decay: decoupled for Keras 3, coupled for the others."""
    run, expected = fork(Run(system, nesterov, changing, wd=0.1))
    velocity, options = fs.from_convention(system, run.v, **run.arguments())
    for k, params in enumerate(follow(run, velocity, options | {"weight_decay": 0.1}, changing)):
        assert distance(params, expected[k]) <= TOLERANCE, k


@runs
def test_object_goes_on(system: str, nesterov: bool) -> None:
    run, expected = fork(Run(system, nesterov, changing))
    velocity, options = fs.from_convention(system, run.v, **run.arguments())
    make = fs.MomentumNesterov if nesterov else fs.Momentum
    opt = make(run.x, lr=lambda t: changing(BEFORE + t), **options)
    state = opt.state_dict()
    state["state"] = {name: {"velocity": velocity[name], "step": BEFORE} for name in SIZES}
    opt.load_state_dict(state)
    for k, t in enumerate(range(BEFORE, BEFORE + AFTER)):
        opt.step({name: gradient_at(t)(x) for name, x in run.x.items()})
        assert distance(run.x, expected[k]) <= TOLERANCE, k


def test_unconverted_velocity_is_another_run() -> None:
    """A Keras velocity in our default form points uphill and is lr times too short."""
    run, expected = fork(Run("keras", True, changing))
    unconverted = {name: v.copy() for name, v in run.v.items()}
    *_, last = follow(run, unconverted, {"momentum": MU}, changing)
    assert distance(last, expected[-1]) > 1e-2


def test_a_drop_of_lr_acts_on_the_history_only_outside() -> None:
    """Extra way of the form with lr inside: (lr_old - lr_new) mu / (1 - mu) times the buffer."""
    old, new, buffer = 0.05, 0.005, 1.0
    outside, inside = np.zeros(1), np.zeros(1)
    v_out, v_in = np.full(1, buffer), np.full(1, -old * buffer)
    for _ in range(400):
        zero = np.zeros(1)
        fs.fused_momentum_step(outside, zero, v_out, lr=new, momentum=MU)
        fs.fused_momentum_step(inside, zero, v_in, lr=new, momentum=MU, lr_in_velocity=True)
    assert np.allclose(outside - inside, (old - new) * MU / (1 - MU) * buffer, rtol=1e-12)


# --- the real one -------------------------------------------------------------------------------


@pytest.mark.framework("torch")
@pytest.mark.parametrize("inside", [None, True], ids=["as it is", "lr inside"])
@pytest.mark.parametrize("settings", [{}, {"nesterov": True}, {"dampening": 0.3}])
def test_torch_goes_on(settings: dict[str, Any], inside: bool | None) -> None:
    lr = changing if inside is None else then_constant
    theirs = {name: torch.nn.Parameter(torch.from_numpy(x)) for name, x in start()[0].items()}
    oracle = torch.optim.SGD(theirs.values(), lr=1.0, momentum=MU, **settings)

    def step(t: int) -> None:
        oracle.param_groups[0]["lr"] = lr(t)
        for p in theirs.values():
            p.grad = torch.from_numpy(gradient_at(t)(p.detach().numpy()))
        oracle.step()

    for t in range(BEFORE):
        step(t)
    buffers = {name: oracle.state[p]["momentum_buffer"] for name, p in theirs.items()}
    velocity, options = fs.from_convention(
        "torch", buffers, momentum=MU, lr=lr(BEFORE - 1), lr_in_velocity=inside
    )
    assert all(isinstance(v, torch.Tensor) for v in velocity.values())
    ours = {name: p.detach().clone() for name, p in theirs.items()}
    nesterov = settings.get("nesterov", False)
    function = fs.fused_nesterov_step if nesterov else fs.fused_momentum_step
    options |= {k: v for k, v in settings.items() if k != "nesterov"}
    for t in range(BEFORE, BEFORE + AFTER):
        grads = {name: gradient_at(t)(p.numpy()) for name, p in ours.items()}
        function(ours, grads, velocity, lr=lr(t), **options)
        step(t)
        expected = {name: p.detach().numpy() for name, p in theirs.items()}
        assert distance({n: p.numpy() for n, p in ours.items()}, expected) <= TOLERANCE, t


@pytest.mark.framework("torch")
def test_bfloat16_of_torch() -> None:
    """Any dtype and strides; the learning rate is divided out with one rounding."""
    source = torch.tensor([[1.0, -3.0], [0.5, 7.0]], dtype=torch.bfloat16).T
    velocity, _ = fs.from_convention("keras", source, lr=0.1, lr_in_velocity=False)
    assert velocity.dtype == torch.bfloat16
    assert velocity.stride() == source.stride()
    expected = (source.float() * np.float32(-10)).to(torch.bfloat16)
    assert torch.equal(velocity, expected)


# --- what is called Nesterov and is not -----------------------------------------------------------


def test_neupy_is_heavy_ball_with_other_constants() -> None:
    """The advice of the refusal, over a changing learning rate."""
    (x, v), theirs = start(), start()
    for t in range(BEFORE + AFTER):
        if t == BEFORE:
            x = {name: p.copy() for name, p in theirs[0].items()}
            v, options = fs.from_convention("neupy", theirs[1], nesterov=False, momentum=MU**2)
        for name in SIZES:
            p, u, lr = theirs[0][name], theirs[1][name], changing(t)
            grad = gradient_at(t)(p)
            u[...] = MU * (MU * u - lr * grad) - lr * grad
            p += u
        if t >= BEFORE:
            grads = {name: gradient_at(t)(p) for name, p in x.items()}
            fs.fused_momentum_step(x, grads, v, lr=(1 + MU) * changing(t), **options)
            assert distance(x, theirs[0]) <= TOLERANCE, t


def test_bmuf_is_heavy_ball_with_other_constants() -> None:
    """The advice of the refusal; G is the gradient at the shifted point, bm the block momentum."""
    (x, v), theirs = start(), start()
    for t in range(BEFORE + AFTER):
        if t == BEFORE:
            x = {name: p.copy() for name, p in theirs[0].items()}
            enlarged = {name: (1 + MU) * u for name, u in theirs[1].items()}
            v, options = fs.from_convention("cntk", enlarged, momentum=MU)
        for name in SIZES:
            w, u = theirs[0][name], theirs[1][name]
            u[...] = MU * u + (1 - MU) * changing(t) * gradient_at(t)(w)
            w -= u
            w -= MU * u
        if t >= BEFORE:
            grads = {name: gradient_at(t)(p) for name, p in x.items()}
            fs.fused_momentum_step(x, grads, v, lr=(1 + MU) * changing(t), **options)
            assert distance(x, theirs[0]) <= TOLERANCE, t


def impulse(p_of_v: float, p_of_g: float, steps: int = 6) -> list[float]:
    """How far one gradient moves the parameter at each step: v = mu v + g, lr = 1."""
    v, moves = 0.0, []
    for t in range(steps):
        g = float(t == 0)
        v = MU * v + g
        moves.append(p_of_v * v + p_of_g * g)
    return moves


def test_chainer_looks_ahead_twice() -> None:
    """Two steps of the future at once, of the same total 1 / (1 - mu) as Nesterov's."""
    chainer = impulse(MU**2, 1 + MU)
    assert np.allclose(chainer, [1 + MU + MU**2, *(MU**k for k in range(3, 8))], rtol=1e-12)
    nesterov = impulse(MU, 1.0)
    assert np.allclose(nesterov, [1 + MU, *(MU**k for k in range(2, 7))], rtol=1e-12)
    assert np.isclose(sum(impulse(MU**2, 1 + MU, 500)), 1 / (1 - MU), rtol=1e-12)
    assert np.isclose(sum(impulse(MU, 1.0, 500)), 1 / (1 - MU), rtol=1e-12)


@pytest.mark.parametrize("name", NOT_NESTEROV)
def test_pretenders_are_refused(name: str) -> None:
    """With what it computes and what to use instead."""
    with pytest.raises(ValueError, match=re.escape(NOT_NESTEROV[name].formula)) as caught:
        fs.from_convention(name, np.zeros(3))
    assert NOT_NESTEROV[name].instead in str(caught.value)


@pytest.mark.parametrize("system", ["chainer", "neupy"])
def test_systems_with_a_pretender_ask(system: str) -> None:
    pretender = NOT_NESTEROV[CONVENTIONS[system].pretender]
    with pytest.raises(ValueError, match=re.escape(pretender.why)):
        fs.from_convention(system, np.zeros(3), nesterov=True)
    with pytest.raises(ValueError, match="nesterov: say whether"):
        fs.from_convention(system, np.zeros(3))
    fs.from_convention(system, np.zeros(3), nesterov=False)


@pytest.mark.parametrize(
    ("system", "nesterov", "message"),
    [("chainer_corrected", True, "no Nesterov"), ("dl4j", False, "no momentum but Nesterov's")],
)
def test_forms_that_a_system_lacks(system: str, nesterov: bool, message: str) -> None:
    with pytest.raises(ValueError, match=f"nesterov: .*{message}"):
        fs.from_convention(system, np.zeros(3), nesterov=nesterov)


# --- arguments ----------------------------------------------------------------------------------


def test_options_are_those_of_the_step() -> None:
    """And nothing else: what was not said is not decided."""
    v = np.ones(2)
    assert fs.from_convention("torch", v).options == {"lr_in_velocity": False}
    assert fs.from_convention("mxnet", v, momentum=0.5).options == {
        "lr_in_velocity": True,
        "momentum": 0.5,
    }
    assert fs.from_convention("keras", v).options == {
        "lr_in_velocity": True,
        "decoupled_weight_decay": True,
    }
    assert fs.from_convention("cntk", v, momentum=0.5).options == {
        "lr_in_velocity": True,
        "momentum": 0.5,
        "dampening": 0.5,
        "dampen_first_step": True,
    }


def test_structure_dtype_and_strides_stay() -> None:
    velocity = {
        "layers": [{"W": np.asfortranarray(np.ones((3, 4), np.float32))}, None],
        "head": (np.ones(2, np.float64), np.ones((), np.float32)),
        "half": np.ones(3, np.float16),
    }
    got = fs.from_convention("caffe", velocity).velocity
    assert got["layers"][1] is None
    assert isinstance(got["head"], tuple)
    for new, old in (
        (got["layers"][0]["W"], velocity["layers"][0]["W"]),
        (got["head"][0], velocity["head"][0]),
        (got["head"][1], velocity["head"][1]),
        (got["half"], velocity["half"]),
    ):
        assert (new.dtype, new.shape, new.strides) == (old.dtype, old.shape, old.strides)
        assert np.array_equal(new, -old)
        assert not np.shares_memory(new, old)
        assert (old == 1).all()


def test_read_only_and_strided_velocities() -> None:
    wide = np.arange(8.0)
    view = wide[::2]
    view.flags.writeable = False
    assert np.array_equal(fs.from_convention("torch", view).velocity, [0, 2, 4, 6])


def test_lr_may_be_what_a_step_takes() -> None:
    schedule = fs.ExponentialLR(base_lr=0.5)
    for lr in (0.5, np.float32(0.5), np.array(0.5), schedule):
        got = fs.from_convention("keras", np.ones(2), lr=lr, lr_in_velocity=False).velocity
        assert np.array_equal(got, [-2, -2])


def test_zero_lr_divides_nothing() -> None:
    with pytest.raises(ValueError, match=r"lr: got 0\.0.*divided"):
        fs.from_convention("keras", np.ones(2), lr=0.0, lr_in_velocity=False)
    with pytest.raises(ValueError, match=r"lr: got 5e-324.*divided"):
        fs.from_convention("keras", np.ones(2), lr=5e-324, lr_in_velocity=False)
    inside = fs.from_convention("torch", np.ones(2), lr=0.0, lr_in_velocity=True).velocity
    assert np.array_equal(inside, [0, 0])


def test_float16_is_not_rescaled() -> None:
    half = {"w": np.ones(2, np.float16)}
    with pytest.raises(ValueError, match=r"velocity\['w'\]: float16"):
        fs.from_convention("keras", half, lr=1e-6, lr_in_velocity=False)
    assert fs.from_convention("keras", half).velocity["w"].dtype == np.float16


V = np.zeros(3)
BAD: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
    (ValueError, "system: expected .*keras.*got 'kears'", ("kears", V), {}),
    (TypeError, "system: .*got None", (None, V), {}),
    (TypeError, "velocity: expected an array.*got 'x'", ("torch", "x"), {}),
    (TypeError, r"velocity\['a'\]\[0\]: expected an array.*'x'", ("torch", {"a": ["x"]}), {}),
    (TypeError, r"velocity\[0\]: .*int64", ("torch", [np.arange(3)]), {}),
    (ValueError, "velocity is empty", ("torch", {}), {}),
    (ValueError, "velocity is empty", ("torch", [None]), {}),
    (ValueError, "velocity is empty", ("torch", None), {}),
    (ValueError, "lr: 'keras' keeps.*inside", ("keras", V), {"lr_in_velocity": False}),
    (ValueError, "lr: 'torch' keeps.*outside", ("torch", V), {"lr_in_velocity": True}),
    (ValueError, "lr: .*got -0.1", ("keras", V), {"lr": -0.1}),
    (TypeError, "lr_in_velocity: ", ("keras", V), {"lr_in_velocity": "no"}),
    (TypeError, "nesterov: ", ("keras", V), {"nesterov": "yes"}),
    (ValueError, "momentum: .*got 1.0", ("keras", V), {"momentum": 1.0}),
    (ValueError, "momentum: 'cntk' has unit gain", ("cntk", V), {}),
    (ValueError, "params: .*leave them out", ("keras", V), {"params": np.ones(3)}),
    (ValueError, "nesterov: say whether", ("pennylane", V), {}),
    (ValueError, "momentum: .*base point", ("climin", V), {"nesterov": True}),
    (ValueError, "params: .*base point", ("climin", V), {"nesterov": True, "momentum": 0.9}),
]


@pytest.mark.parametrize(
    ("kind", "message", "given", "options"), BAD, ids=[f"{k}" for k in range(len(BAD))]
)
def test_refused_arguments(
    kind: type[Exception], message: str, given: tuple[Any, ...], options: dict[str, Any]
) -> None:
    with pytest.raises(kind, match=message):
        fs.from_convention(*given, **options)


def test_moving_parameters_is_all_or_nothing() -> None:
    x = {"a": np.ones(2), "b": np.ones(3)}
    v = {"a": np.ones(2), "b": np.ones(4)}
    with pytest.raises(ValueError, match=r"velocity\['b'\]: expected shape \(3,\) like params"):
        fs.from_convention("pennylane", v, momentum=0.5, nesterov=True, params=x)
    assert all((p == 1).all() for p in x.values())
