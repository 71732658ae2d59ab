"""Velocities of other systems: what sign they have, where the learning rate sits, how to go on.

One table of systems. The conversion, its error messages and the page "Which Nesterov is yours?" of
the documentation follow from it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from fusedstep import _core
from fusedstep.buffers import producer_of
from fusedstep.functional import fused_sgd_step
from fusedstep.groups import is_dict
from fusedstep.hyperparameters import Tree, lr_range
from fusedstep.ranges import Choice, Flag, Real, shown

_IN = "v = mu v - lr g; p += v"
_IN_NESTEROV = "v = mu v - lr g; p += mu v - lr g"
_IN_PLUS = "v = mu v + lr g; p -= v"
_OUT = "v = mu v + g; p -= lr v"
_OUT_NESTEROV = "v = mu v + g; p -= lr (g + mu v)"


class Convention(NamedTuple):
    """The velocity of one system.

    Attributes:
        title: The system, with versions where they matter.
        formula: Its heavy ball as the system writes it; "" if it has none.
        nesterov: The same of its Nesterov momentum; "" if it has none.
        sign: +1 if the velocity is a sum of gradients, -1 if of their negatives.
        lr_inside: The gradients in the velocity are multiplied by the learning rates of their
            steps.
        order: What is done to a gradient before it enters the velocity, and how weights decay.
        source: Where this can be read.
        note: What else a user of the system has to know.
        unit_gain: The gradients are multiplied by `1 - momentum`, too.
        base_point: With Nesterov momentum the system keeps the point from which it looks ahead.
        decoupled: Its weight decay shrinks the parameters instead of entering the velocity.
        pretender: The entry of `NOT_NESTEROV` that its Nesterov momentum is.
    """

    title: str
    formula: str
    nesterov: str
    sign: int
    lr_inside: bool
    order: str
    source: str
    note: str = ""
    unit_gain: bool = False
    base_point: bool = False
    decoupled: bool = False
    pretender: str = ""


class Pretender(NamedTuple):
    """A rule that is called Nesterov, or momentum, and that no step of ours continues as it is.

    Attributes:
        title: The system.
        formula: What it computes.
        why: What that is, and how it differs.
        instead: What to use.
        source: Where this can be read.
    """

    title: str
    formula: str
    why: str
    instead: str
    source: str


CONVENTIONS: dict[str, Convention] = {
    "torch": Convention(
        "PyTorch `SGD`", _OUT, _OUT_NESTEROV, +1, False,
        "the caller clips; then + wd p (coupled)",
        "torch/optim/sgd.py",
        "Pass the run's `dampening` on: it means the same here.",
    ),
    "optax": Convention(
        "optax `sgd`, `trace`", _OUT, _OUT_NESTEROV, +1, False,
        "as chained by the caller",
        "optax/transforms/_accumulation.py",
    ),
    "braintools": Convention(
        "braintools `Momentum`, `MomentumNesterov`", _OUT, _OUT_NESTEROV, +1, False,
        "clip by global norm, clip by value, then + wd p (coupled)",
        "braintools/optim/_optax_optimizer.py",
        "Before 0.2 the decay was decoupled: pass `decoupled_weight_decay=True` for such a run.",
    ),
    "lucid": Convention(
        "lucid `SGD`", _OUT, _OUT_NESTEROV, +1, False,
        "+ wd p (coupled); no clip",
        "lucid.optim.SGD; from 3.0 on lucid/_C/optim/SGD.cpp",
        "Nesterov from 3.0 on.",
    ),
    "tensorflow1": Convention(
        "TensorFlow 1 `MomentumOptimizer`; NeuPy since it wraps that",
        "v = mu v + g; p -= lr v", "v = mu v + g; p -= lr g + lr mu v", +1, False,
        "none",
        "tensorflow/core/kernels/training_ops.cc, ApplyMomentum",
        "With sparse gradients only the rows present are updated.",
    ),
    "tensorflowsharp": Convention(
        "TensorFlowSharp `SGD`", "v = mu v - g; p += lr v", "v = mu v - g; p += lr (mu v - g)",
        -1, False,
        "none; lr / (1 + decay t)",
        "TensorFlowSharp/Optimizer.cs",
        "The comment beside the code puts the learning rate inside; the code does not.",
    ),
    "chainer_corrected": Convention(
        "Chainer `CorrectedMomentumSGD`", "v = mu v - g; p += lr v", "", -1, False,
        "hooks in the order in which they were added",
        "chainer/optimizers/corrected_momentum_sgd.py",
    ),
    "keras": Convention(
        "Keras 3 `SGD`", _IN, _IN_NESTEROV, -1, True,
        "one clip at most (per variable, global or by value); p -= lr wd p (decoupled)",
        "keras/src/optimizers/sgd.py",
        "`clipnorm` clips each variable by itself, `global_clipnorm` all of them together.",
        decoupled=True,
    ),
    "keras2": Convention(
        "Keras 1 and 2 `SGD`; TensorFlow `ApplyKerasMomentum`", _IN, _IN_NESTEROV, -1, True,
        "clip by global norm, clip by value; decay only as a term of the loss, clipped with it",
        "keras/optimizers.py; tensorflow/core/kernels/training_ops.cc",
        "Its argument `decay` is that of the learning rate: `lr / (1 + decay t)`.",
    ),
    "mxnet": Convention(
        "MXNet `SGD`; `NAG` without decay", "v = mu v - lr g; w += v", _IN_NESTEROV, -1, True,
        "clip by value after rescaling, then + wd w (coupled)",
        "src/operator/optimizer_op-inl.h",
        "`NAG` with `wd` other than 0 is another rule: `mxnet_nag_decay`.",
    ),
    "chainer": Convention(
        "Chainer `MomentumSGD`", _IN, "", -1, True,
        "hooks in the order in which they were added",
        "chainer/optimizers/momentum_sgd.py",
        pretender="chainer_nesterovag",
    ),
    "lasagne": Convention(
        "Lasagne `momentum`, `nesterov_momentum`", _IN, _IN_NESTEROV, -1, True,
        "as written by the caller",
        "lasagne/updates.py",
    ),
    "sklearn": Convention(
        "scikit-learn `MLPClassifier`, `MLPRegressor`", _IN, _IN_NESTEROV, -1, True,
        "(g + alpha W) / n: coupled, no biases",
        "sklearn/neural_network/_stochastic_optimizers.py",
    ),
    "dl4j": Convention(
        "Deeplearning4j `Nesterovs`", "",
        "u = v; v = mu v - lr g; p -= mu u - (1 + mu) v", -1, True,
        "normalise or clip, L1 and L2 (coupled); `WeightDecay` after the update (decoupled)",
        "nd4j NesterovsUpdater.java; libnd4j updaterNesterovs.cpp",
        "Pass `decoupled_weight_decay=True` for `WeightDecay` with `applyLR`.",
    ),
    "neupy": Convention(
        "NeuPy up to 0.6 `Momentum`", _IN, "", -1, True,
        "none",
        "neupy/algorithms/gd/momentum.py",
        pretender="neupy_nesterov",
    ),
    "deep_diamond": Convention(
        "Deep Diamond SGD", _IN, "w += mu v; g at w; w -= mu v; v = mu v - lr g; w += v", -1, True,
        "w -= lr wd w (decoupled)",
        "deep_diamond directed.clj",
        "With decay and Nesterov the runs differ: it shrinks the base point, we the look-ahead.",
        base_point=True, decoupled=True,
    ),
    "caffe": Convention(
        "Caffe `SGD`, `Nesterov`", _IN_PLUS,
        "u = v; v = mu v + lr g; p -= (1 + mu) v - mu u", +1, True,
        "clip by global norm, / iter_size, then + wd p (coupled)",
        "src/caffe/solvers/sgd_solver.cpp, nesterov_solver.cpp",
        "`lr_mult` and `decay_mult` of a blob are param groups here.",
    ),
    "caffe2": Convention(
        "Caffe2 `MomentumSGD`", _IN_PLUS,
        "u = v; v = mu v + lr g; p -= (1 + mu) v - mu u", +1, True,
        "none",
        "caffe2/sgd/momentum_sgd_op.h",
    ),
    "cntk": Convention(
        "CNTK `momentum_sgd`, `nesterov` (unit gain, its default)",
        "v = mu v + (1 - mu) lr g; p -= v",
        "v = mu v + (1 - mu) lr g; p -= mu v + (1 - mu) lr g", +1, True,
        "clip per matrix, then + l2 p (coupled); noise and L1 after the update",
        "Source/CNTKv2LibraryDll/Learner.cpp; Source/Math/Matrix.cpp",
        "`momentum` is that of a minibatch: `mu ** (samples / minibatch_size)` of the schedule's.",
        unit_gain=True,
    ),
    "cntk_no_unit_gain": Convention(
        "CNTK with `unit_gain=False`", _IN_PLUS, "v = mu v + lr g; p -= mu v + lr g", +1, True,
        "clip per matrix, then + l2 p (coupled); noise and L1 after the update",
        "Source/CNTKv2LibraryDll/Learner.cpp; Source/Math/Matrix.cpp",
        "`momentum` is that of a minibatch: `mu ** (samples / minibatch_size)` of the schedule's.",
    ),
    "pennylane": Convention(
        "PennyLane `MomentumOptimizer`, `NesterovMomentumOptimizer`",
        "a = mu a + lr g; x -= a", "g at x - mu a; a = mu a + lr g; x -= a", +1, True,
        "none",
        "pennylane/optimize/nesterov_momentum.py",
        base_point=True,
    ),
    "climin": Convention(
        "climin `GradientDescent`", "step = mu step + rate g; wrt -= step",
        "wrt -= mu step; g at wrt; wrt -= rate g; step = mu step + rate g", +1, True,
        "none",
        "climin/gd.py",
        "The formula in its documentation lacks the momentum term; the code has it.",
        base_point=True,
    ),
}  # fmt: skip
"""The systems whose velocity `from_convention` takes, by name."""

NOT_NESTEROV: dict[str, Pretender] = {
    "chainer_nesterovag": Pretender(
        "Chainer `NesterovAG`",
        "v = mu v - lr g; p += mu^2 v - (1 + mu) lr g",
        "looks ahead twice: the paper it cites (arXiv:1212.0901, eq. 7) has the velocity before "
        "the step there, and the code has the one after it. No change of variables makes it "
        "Nesterov's rule",
        "go on in Chainer, or start `MomentumNesterov` with a new velocity; the sum of a "
        "gradient's effects, lr / (1 - mu), is the same",
        "chainer/optimizers/nesterov_ag.py, chainer/chainer#4274",
    ),
    "neupy_nesterov": Pretender(
        "NeuPy up to 0.6, `Momentum(nesterov=True)`",
        "v = mu (mu v - lr g) - lr g; p += v",
        "keeps the corrected step as the velocity, which makes it the heavy ball with momentum "
        "mu^2 and learning rate (1 + mu) lr",
        "continue it exactly with `from_convention('neupy', velocity, nesterov=False)` and "
        "`Momentum` with `momentum=mu**2` and `lr=(1 + mu) * lr`",
        "neupy/algorithms/gd/momentum.py before mid-2018",
    ),
    "bmuf": Pretender(
        "CNTK block momentum (BMUF), `use_nestrov_momentum=True`",
        "V = bm V + (1 - bm) blr G; W -= (1 + bm) V",
        "takes the differences G from the shifted point, which makes it the heavy ball with a "
        "block learning rate of (1 + bm) blr",
        "continue it exactly with the velocity `(1 + bm) * V`, `from_convention('cntk', ..., "
        "momentum=bm)` and `Momentum` with `lr=(1 + bm) * blr`",
        "CNTK BlockMomentumSGD.h",
    ),
    "cntk_sparse": Pretender(
        "CNTK with sparse gradients",
        "v = mu v + u g; p -= mu v + u lr g (nesterov), p -= lr v (momentum_sgd), u = 1 - mu or 1",
        "lacks the learning rate in nesterov's momentum term, and leaves the velocity of rows "
        "without a gradient as it is",
        "start with a new velocity; a `momentum_sgd` whose rows all had gradients continues as "
        "`from_convention('torch', velocity)` with `dampening=momentum` (with unit gain)",
        "Source/Math/Matrix.cpp",
    ),
    "mxnet_nag_decay": Pretender(
        "MXNet 1.9 `NAG` with `wd` other than 0",
        "p_new from v and g + wd p; v = mu v - lr (g + wd p_new)",
        "updates the weight in place first, so that its velocity decays with the new weight",
        "for the documented rule, `from_convention('mxnet', velocity, nesterov=True)` and "
        "`weight_decay=wd`; it leaves the run by an amount of order lr wd per step",
        "src/operator/optimizer_op-inl.h, nag_mom_update",
    ),
}
"""The rules that `from_convention` refuses, by name."""

_system = Choice(*CONVENTIONS, *NOT_NESTEROV)
_flag = Flag()
_momentum = Real(0.0, 1.0, optional=True)


class Continuation(NamedTuple):
    """How to go on with a run of another system.

    Attributes:
        velocity: New arrays in the form of the velocity that was given.
        options: Keyword arguments for `Momentum`, `MomentumNesterov` and their functions.
    """

    velocity: Tree
    options: dict[str, Any]


def from_convention(
    system: str,
    velocity: Tree,
    *,
    lr: float | None = None,
    momentum: float | None = None,
    nesterov: bool | None = None,
    lr_in_velocity: bool | None = None,
    params: Tree = None,
) -> Continuation:
    """The velocity of another system in our convention, and the options to go on with.

    The continued run is that of the system, step by step, also when the learning rate changes:
    unless told otherwise it stays where the system has it, inside the velocity or outside.

    Args:
        system: `"torch"`, `"keras"`, ...: a key of `fusedstep.conventions.CONVENTIONS`.
        velocity: The system's velocity: one array, or a nested dict, list or tuple of arrays in
            the form of the parameters. A None stands for an array that has made no step yet.
        lr: The learning rate of the last step that the system took; needed only with an
            `lr_in_velocity` that is not the system's.
        momentum: The momentum of the coming step, in [0, 1). If given it is among the options.
            Needed where the velocity or the parameters depend on it: CNTK with unit gain, and
            Nesterov momentum of systems that keep the base point.
        nesterov: Whether the run used Nesterov momentum. Needed only where that makes a
            difference: Chainer, NeuPy, PennyLane, climin, Deep Diamond.
        lr_in_velocity: True or False for another form than the system's. The trajectories are
            then the same as long as the learning rate stays `lr`.
        params: The parameters, only for Nesterov momentum of PennyLane, climin and Deep Diamond,
            which keep the base point: moved in place, by `momentum` times the velocity, to the
            point where the gradient is taken, which is the one that our steps update.

    Returns:
        Continuation: `velocity`, new arrays of the given shapes, dtypes and strides, made by the
        library of each array (by NumPy where that library's arrays are immutable), and `options`.

    Raises:
        TypeError: If an argument is of a wrong kind or a leaf is no float array.
        ValueError: If the system is unknown; if what it calls Nesterov is not (the message says
            what it is, and what to use); or if a number is missing, out of range or cannot be
            used. Nothing has changed then.

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> weights = {"w": np.ones(2, np.float32)}
        >>> theirs = {"w": np.array([-0.5, 0.25], np.float32)}  # of keras.optimizers.SGD
        >>> velocity, options = fs.from_convention("keras", theirs)
        >>> velocity["w"], options["lr_in_velocity"]
        (array([-0.5 ,  0.25], dtype=float32), True)
        >>> velocity, options = fs.from_convention("keras", theirs, lr=0.5, lr_in_velocity=False)
        >>> velocity["w"], options["lr_in_velocity"]
        (array([ 1. , -0.5], dtype=float32), False)
        >>> grads = {"w": np.zeros(2, np.float32)}
        >>> options["momentum"] = 0.5
        >>> result = fs.fused_momentum_step(weights, grads, velocity, lr=0.5, **options)
        >>> weights["w"]
        array([0.75 , 1.125], dtype=float32)
    """
    convention = _lookup(system, nesterov)
    momentum = _momentum("momentum", momentum)
    inside = convention.lr_inside
    if lr_in_velocity is not None:
        inside = _flag("lr_in_velocity", lr_in_velocity)
    factor = _factor(system, convention, inside, lr)
    options: dict[str, Any] = {"lr_in_velocity": inside}
    if momentum is not None:
        options["momentum"] = momentum
    if convention.unit_gain:
        _require(momentum, f"momentum: {system!r} has unit gain; pass the run's momentum")
        options |= {"dampening": momentum, "dampen_first_step": True}
    if convention.decoupled:
        options["decoupled_weight_decay"] = True
    moves = convention.base_point and bool(nesterov)
    _check_params(system, moves, momentum, params)
    converted = _scaled(velocity, factor)
    if moves and momentum is not None:
        _look_ahead(params, velocity, momentum, convention.sign)
    return Continuation(converted, options)


def _require(given: object, message: str) -> None:
    if given is None:
        raise ValueError(message)


def _lookup(system: str, nesterov: bool | None) -> Convention:
    """The row of a system; refuses what is not Nesterov, or could be."""
    name = _system("system", system)
    if nesterov is not None:
        nesterov = _flag("nesterov", nesterov)
    if name in NOT_NESTEROV:
        raise ValueError(_refusal(name))
    convention = CONVENTIONS[name]
    if nesterov is None and convention.pretender:
        raise ValueError(
            f"nesterov: say whether the run used what {name!r} calls Nesterov momentum: True or "
            f"False (True is refused: it is {convention.pretender!r})"
        )
    if nesterov is None and convention.base_point:
        raise ValueError(
            f"nesterov: say whether the run of {name!r} used it: True or False; if so, its "
            "parameters are moved to the point where the gradient is taken"
        )
    if nesterov and convention.pretender:
        raise ValueError(_refusal(convention.pretender))
    if nesterov and not convention.nesterov:
        raise ValueError(f"nesterov: {convention.title} has no Nesterov momentum")
    if nesterov is False and not convention.formula:
        raise ValueError(f"nesterov: {convention.title} has no momentum but Nesterov's")
    return convention


def _refusal(name: str) -> str:
    entry = NOT_NESTEROV[name]
    return (
        f"system {name!r}: {entry.title} computes {entry.formula}: it {entry.why}. Instead: "
        f"{entry.instead}. Source: {entry.source}"
    )


def _factor(system: str, convention: Convention, inside: bool, lr: float | None) -> float:
    """What the velocity is multiplied by. Ours is a sum of gradients outside, -lr g inside."""
    number: float | None = None if lr is None else lr_range("lr", lr)
    if inside == convention.lr_inside:
        return float(-convention.sign if inside else convention.sign)
    where = "inside" if convention.lr_inside else "outside"
    _require(
        number,
        f"lr: {system!r} keeps the learning rate {where} its velocity; for "
        f"lr_in_velocity={inside} pass lr, the learning rate of the last step that it took",
    )
    assert number is not None
    if inside:
        return -convention.sign * number
    if number == 0.0 or math.isinf(1.0 / number):
        raise ValueError(
            f"lr: got {number!r}, by which the velocity of {system!r} would be divided: steps with "
            "a learning rate of 0 left nothing in it to recover; leave lr_in_velocity out, which "
            "keeps the learning rate inside and needs no lr"
        )
    return convention.sign / number


def _check_params(system: str, moves: bool, momentum: float | None, params: Tree) -> None:
    if not moves:
        if params is not None:
            raise ValueError(
                f"params: this run of {system!r} keeps the point where the gradient is taken; "
                "nothing has to be moved, leave them out"
            )
        return
    what = f"Nesterov momentum of {system!r} keeps the base point"
    _require(momentum, f"momentum: {what}; pass the momentum of the coming step")
    _require(params, f"params: {what}; pass the parameters, which are moved in place")


# --- arrays -------------------------------------------------------------------------------------


def _scaled(velocity: Tree, factor: float) -> Tree:
    """A new tree that holds `factor` times the arrays of the old one."""
    sources: list[Any] = []
    made: list[Any] = []
    tree = _like(velocity, "velocity", factor, sources, made)
    if not made:
        raise ValueError("velocity is empty: it holds no array")
    # The sgd rule on zeros: one rounding, any dtype and strides, and the libraries get to know.
    fused_sgd_step(made, sources, lr=abs(factor), maximize=factor > 0)
    return tree


def _like(node: Any, path: str, factor: float, sources: list[Any], made: list[Any]) -> Any:
    """The tree with zeros in place of its arrays; both are appended to the lists."""
    if node is None:
        return None
    if _core.is_array(node):
        made.append(_zeros(node, path, factor))
        sources.append(node)
        return made[-1]
    if is_dict(node):
        items = node.items()
        return {k: _like(v, f"{path}[{k!r}]", factor, sources, made) for k, v in items}
    if isinstance(node, (list, tuple)):
        leaves = [_like(v, f"{path}[{i}]", factor, sources, made) for i, v in enumerate(node)]
        return leaves if isinstance(node, list) else tuple(leaves)
    raise TypeError(
        f"{path}: expected an array, or a dict, list or tuple of arrays, got {shown(node)}"
    )


def _zeros(array: Any, path: str, factor: float) -> Any:
    try:
        dtype = _core.describe(array)[1]
    except (TypeError, ValueError, BufferError) as error:
        raise type(error)(f"{path}: {error}") from None
    if dtype == "float16" and abs(factor) != 1.0:
        raise ValueError(
            f"{path}: float16 has no room for a velocity in units of another learning rate; pass a "
            "float32 copy, or leave lr_in_velocity out"
        )
    make = producer_of(type(array)).zeros_like or producer_of(object).zeros_like
    assert make is not None  # arrays of unknown libraries get NumPy's
    return make(array, dtype)


def _look_ahead(params: Tree, velocity: Tree, momentum: float, sign: int) -> None:
    """Moves the base point against the gradients in the velocity, `momentum` times."""
    try:
        fused_sgd_step(params, velocity, lr=momentum, maximize=sign < 0)
    except (TypeError, ValueError, BufferError) as error:
        raise type(error)(str(error).replace("grads", "velocity")) from None
