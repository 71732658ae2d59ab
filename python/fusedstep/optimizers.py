"""SGD with and without momentum: each class declares its hyper-parameters and its rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from fusedstep.base import Optimizer
from fusedstep.hyperparameters import (
    DampenFirstStep,
    Dampening,
    DecoupledWeightDecay,
    GradClipNorm,
    GradClipScope,
    GradClipValue,
    LearningRate,
    LrInVelocity,
    Maximize,
    MomentumFactor,
    Nesterov,
    NextMomentum,
    OnNonfinite,
    Params,
    RescaleGrad,
    SkipGradNorm,
    WeightDecay,
)
from fusedstep.ranges import shown


@final
class SGD(
    Optimizer,
    rules={"sgd": "momentum == 0 and not varies", "momentum": "True"},
    function="fused_sgd_step",
    function_rules=("sgd",),
    derived={"lr_in_velocity": "False", "dampen_first_step": "False"},
):
    r"""Stochastic gradient descent, PyTorch form.

    With `momentum` > 0 it is `Momentum`, and with `nesterov=True`, too, `MomentumNesterov`. Without
    momentum it keeps no buffer and moves 12 bytes per float32 element:

    .. math::
        g_t &= \mathrm{clip}(g_t) + \lambda\, p_{t-1} \\
        p_t &= p_{t-1} - \eta\, g_t

    Args:
        params: A tree of arrays to update in place, or a list of param groups; None to register
            them later. Dense, writable; float32, float64, float16 or bfloat16.
        The hyper-parameters of the signature.

    State:
        velocity: With momentum only; float32 (float64 for float64 parameters), made by the
            parameter's own library with its strides.

    Raises:
        TypeError: If an argument is of a wrong kind; the message names it and what it was.
        ValueError: If a hyper-parameter is out of range, a param group has an unknown key, or, as
            in PyTorch, `nesterov` comes without momentum or with dampening.
        BufferError: If a parameter is read-only or overlaps another one.

    Numerics:
        Arithmetic in float32 (float64 for float64), each buffer rounded once per step; the same
        bits on every instruction set and for any number of threads. In PyTorch's form they are
        those of `torch.optim.SGD` (for-loop and foreach).

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> weights = {"w": np.ones(2, np.float32)}
        >>> optimizer = fs.SGD(weights, lr=0.5)
        >>> result = optimizer.step({"w": np.array([1.0, -0.5], np.float32)})
        >>> weights["w"]
        array([0.5 , 1.25], dtype=float32)

    Function:
        >>> import numpy as np, fusedstep as fs
        >>> p, g = np.ones(2, np.float32), np.array([1.0, -0.5], np.float32)
        >>> result = fs.fused_sgd_step(p, g, lr=0.5)
        >>> p
        array([0.5 , 1.25], dtype=float32)

    References:
        Robbins and Monro, 1951, *A stochastic approximation method*; `torch.optim.SGD`.
    """

    def __init__(
        self,
        params: Params = None,
        lr: LearningRate = 1e-3,
        momentum: MomentumFactor = 0.0,
        *,
        dampening: Dampening = 0.0,
        nesterov: Nesterov = False,
        weight_decay: WeightDecay = 0.0,
        decoupled_weight_decay: DecoupledWeightDecay = False,
        grad_clip_norm: GradClipNorm = None,
        grad_clip_value: GradClipValue = None,
        rescale_grad: RescaleGrad = 1.0,
        maximize: Maximize = False,
        on_nonfinite: OnNonfinite = "propagate",
        grad_clip_scope: GradClipScope = "all",
        skip_grad_norm: SkipGradNorm = None,
    ) -> None:
        self._set_up(locals())

    @staticmethod
    def _check_form(group: Mapping[str, Any]) -> None:
        momentum, dampening = group["momentum"], group["dampening"]
        zero = isinstance(momentum, (int, float)) and momentum == 0
        if group["nesterov"] and (zero or dampening != 0):
            raise ValueError(
                "nesterov: needs momentum > 0 and dampening = 0, got "
                f"momentum = {shown(momentum)}, dampening = {shown(dampening)}"
            )


@final
class Momentum(
    Optimizer,
    rules={"momentum": "True"},
    function="fused_momentum_step",
    derived={"nesterov": "False"},
):
    r"""Gradient descent with momentum (heavy ball), PyTorch form: the learning rate is outside.

    .. math::
        g_t &= \mathrm{clip}(g_t) + \lambda\, p_{t-1} \\
        v_t &= \mu\, v_{t-1} + g_t \\
        p_t &= p_{t-1} - \eta\, v_t

    Args:
        params: A tree of arrays to update in place, or a list of param groups; None to register
            them later. Dense, writable; float32, float64, float16 or bfloat16.
        The hyper-parameters of the signature.

    State:
        velocity: float32 (float64 for float64 parameters), made by the parameter's own library
            with its strides; on an array's first step `v = g`.

    Raises:
        TypeError: If an argument is of a wrong kind; the message names it and what it was.
        ValueError: If a hyper-parameter is out of range, or a param group has an unknown key.
        BufferError: If a parameter is read-only or overlaps another one.

    Numerics:
        Arithmetic in float32 (float64 for float64), each buffer rounded once per step; the same
        bits on every instruction set and for any number of threads. In PyTorch's form they are
        those of `torch.optim.SGD` (for-loop and foreach).

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> weights = {"w": np.ones(2, np.float32)}
        >>> schedule = fs.StepLR(base_lr=0.5, step_size=30, gamma=0.1)
        >>> optimizer = fs.Momentum(lr=schedule, momentum=0.5)
        >>> optimizer.register_trainable_weights(weights)
        >>> for epoch in range(2):
        ...     result = optimizer.step({"w": np.array([1.0, -0.5], np.float32)})
        ...     schedule.step()
        >>> weights["w"]
        array([-0.25 ,  1.625], dtype=float32)

    Function:
        >>> import numpy as np, fusedstep as fs
        >>> p, g = np.ones(2, np.float32), np.array([1.0, -0.5], np.float32)
        >>> state = {}
        >>> for step in range(2):
        ...     state = fs.fused_momentum_step(p, g, **state, lr=0.5, momentum=0.5).state
        >>> p, state["velocity"]
        (array([-0.25 ,  1.625], dtype=float32), array([ 1.5 , -0.75], dtype=float32))

    References:
        Polyak, 1964, *Some methods of speeding up the convergence of iteration methods*.
    """

    def __init__(
        self,
        params: Params = None,
        lr: LearningRate = 1e-3,
        momentum: MomentumFactor = 0.9,
        *,
        next_momentum: NextMomentum = None,
        dampening: Dampening = 0.0,
        dampen_first_step: DampenFirstStep = False,
        lr_in_velocity: LrInVelocity = False,
        weight_decay: WeightDecay = 0.0,
        decoupled_weight_decay: DecoupledWeightDecay = False,
        grad_clip_norm: GradClipNorm = None,
        grad_clip_value: GradClipValue = None,
        rescale_grad: RescaleGrad = 1.0,
        maximize: Maximize = False,
        on_nonfinite: OnNonfinite = "propagate",
        grad_clip_scope: GradClipScope = "all",
        skip_grad_norm: SkipGradNorm = None,
    ) -> None:
        self._set_up(locals())


@final
class MomentumNesterov(
    Optimizer,
    rules={"momentum": "True"},
    function="fused_nesterov_step",
    derived={"nesterov": "True"},
):
    r"""Gradient descent with Nesterov momentum, PyTorch form: the learning rate is outside.

    .. math::
        g_t &= \mathrm{clip}(g_t) + \lambda\, p_{t-1} \\
        v_t &= \mu\, v_{t-1} + g_t \\
        p_t &= p_{t-1} - \eta\, (g_t + \mu\, v_t)

    The arrays hold the look-ahead point, at which the gradient is taken. With a momentum that
    changes from step to step, the last :math:`\mu` is `next_momentum`.

    Args:
        params: A tree of arrays to update in place, or a list of param groups; None to register
            them later. Dense, writable; float32, float64, float16 or bfloat16.
        The hyper-parameters of the signature.

    State:
        velocity: float32 (float64 for float64 parameters), made by the parameter's own library
            with its strides; on an array's first step `v = g`.

    Raises:
        TypeError: If an argument is of a wrong kind; the message names it and what it was.
        ValueError: If a hyper-parameter is out of range, or a param group has an unknown key.
        BufferError: If a parameter is read-only or overlaps another one.

    Numerics:
        Arithmetic in float32 (float64 for float64), each buffer rounded once per step; the same
        bits on every instruction set and for any number of threads. In PyTorch's form they are
        those of `torch.optim.SGD` (for-loop and foreach).

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> weights = {"w": np.ones(2, np.float32)}
        >>> optimizer = fs.MomentumNesterov(weights, lr=0.5, momentum=0.5, grad_clip_norm=2.5)
        >>> result = optimizer.step({"w": np.array([3.0, 4.0], np.float32)})
        >>> result.grad_norm, result.clip_coef
        (5.0, 0.5)
        >>> weights["w"]
        array([-0.125, -0.5  ], dtype=float32)

    Function:
        >>> import numpy as np, fusedstep as fs
        >>> p, g = np.ones(2, np.float32), np.array([1.0, -0.5], np.float32)
        >>> result = fs.fused_nesterov_step(p, g, lr=0.5, momentum=0.5)
        >>> p, result.state["velocity"]
        (array([0.25 , 1.375], dtype=float32), array([ 1. , -0.5], dtype=float32))

    References:
        Nesterov, 1983; Sutskever et al., 2013, *On the importance of initialization and momentum in
        deep learning*, eq. 3-4, in the form of `torch.optim.SGD`.
    """

    def __init__(
        self,
        params: Params = None,
        lr: LearningRate = 1e-3,
        momentum: MomentumFactor = 0.9,
        *,
        next_momentum: NextMomentum = None,
        dampening: Dampening = 0.0,
        dampen_first_step: DampenFirstStep = False,
        lr_in_velocity: LrInVelocity = False,
        weight_decay: WeightDecay = 0.0,
        decoupled_weight_decay: DecoupledWeightDecay = False,
        grad_clip_norm: GradClipNorm = None,
        grad_clip_value: GradClipValue = None,
        rescale_grad: RescaleGrad = 1.0,
        maximize: Maximize = False,
        on_nonfinite: OnNonfinite = "propagate",
        grad_clip_scope: GradClipScope = "all",
        skip_grad_norm: SkipGradNorm = None,
    ) -> None:
        self._set_up(locals())
