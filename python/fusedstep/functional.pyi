"""Signatures of the functional steps; written by `python -m fusedstep._stubs`."""

from fusedstep._core import StepResult
from fusedstep.hyperparameters import (
    DampenFirstStep,
    Dampening,
    DecoupledWeightDecay,
    GradClipNorm,
    GradClipValue,
    LearningRateNow,
    LrInVelocity,
    Maximize,
    MomentumFactor,
    NextMomentum,
    OnNonfinite,
    RescaleGrad,
    Tree,
    WeightDecayNow,
)

def fused_sgd_step(
    params: Tree,
    grads: Tree,
    *,
    lr: LearningRateNow,
    weight_decay: WeightDecayNow = 0.0,
    decoupled_weight_decay: DecoupledWeightDecay = False,
    grad_clip_norm: GradClipNorm = None,
    grad_clip_value: GradClipValue = None,
    rescale_grad: RescaleGrad = 1.0,
    maximize: Maximize = False,
    on_nonfinite: OnNonfinite = "propagate",
    grad_norm: float | None = None,
    param_copy: Tree = None,
) -> StepResult:
    r"""One step of `SGD` on arrays, in place.

    .. math::
        g_t &= \mathrm{clip}(g_t) + \lambda\, p_{t-1} \\
        p_t &= p_{t-1} - \eta\, g_t

    Args:
        params: One array, or a tree of arrays (nested dict, list, tuple, any iterable), updated in
            place. Dense in any dimension order and writable; float32, float64, float16 or bfloat16.
        grads: The gradients: the same tree. Any strides and float dtype; a None leaves its
            parameter (and state) alone.
        lr: Learning rate, >= 0. A number; a buffer of one element; or a schedule object (its
            `current_lr`). A function of t belongs to the optimizer objects, which count steps.
        weight_decay: Decay coefficient, >= 0, added to the gradient after clipping (L2).
        decoupled_weight_decay: True decays the parameter itself, `p -= lr wd p`, not through the
            gradient.
        grad_clip_norm: Largest norm of all gradients of the step together, > 0: they are scaled by
            `min(1, grad_clip_norm / norm)`. `inf` measures the norm without clipping. None:
            neither.
        grad_clip_value: Largest magnitude of a gradient element, > 0, applied after the norm clip.
            None: no limit.
        rescale_grad: Multiplies every gradient before anything else is done with it, finite.
        maximize: True ascends instead of descending.
        on_nonfinite: What a step does whose gradients hold inf or NaN: compute with them
            ("propagate"), leave everything as it was ("skip"), or do so and raise
            FloatingPointError ("raise").
        grad_norm: The norm of all gradients, before `rescale_grad`, if the caller has reduced it
            already (over processes or shards): sqrt of the sum of all `sum_squares(grads)`.
        param_copy: float16 or bfloat16 arrays that receive the new parameters, rounded once.

    Returns:
        StepResult: `grad_norm`, `clip_coef`, `skipped` and `state`, the dict to splat into the next
        call (empty: the rule keeps none).

    Raises:
        TypeError: If an argument is of a wrong kind, a leaf is no array, or trees differ in form.
        ValueError: If a number is out of range, or shapes, dtypes or strides disagree.
        BufferError: If an array to be written is read-only or overlaps another one.
        FloatingPointError: With `on_nonfinite="raise"`, if a gradient holds inf or NaN.
            A call that raises has changed nothing. Messages name the argument, path and value.

    Numerics:
        Arithmetic in float32 (float64 for float64), each buffer rounded once per step; the same
        bits on every instruction set and for any number of threads. In PyTorch's form they are
        those of `torch.optim.SGD` (for-loop and foreach).

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> p, g = np.ones(2, np.float32), np.array([1.0, -0.5], np.float32)
        >>> result = fs.fused_sgd_step(p, g, lr=0.5)
        >>> p
        array([0.5 , 1.25], dtype=float32)

    References:
        Robbins and Monro, 1951, *A stochastic approximation method*; `torch.optim.SGD`.
    """

def fused_momentum_step(
    params: Tree,
    grads: Tree,
    velocity: Tree = None,
    *,
    lr: LearningRateNow,
    momentum: MomentumFactor = 0.9,
    next_momentum: NextMomentum = None,
    dampening: Dampening = 0.0,
    dampen_first_step: DampenFirstStep = False,
    lr_in_velocity: LrInVelocity = False,
    weight_decay: WeightDecayNow = 0.0,
    decoupled_weight_decay: DecoupledWeightDecay = False,
    grad_clip_norm: GradClipNorm = None,
    grad_clip_value: GradClipValue = None,
    rescale_grad: RescaleGrad = 1.0,
    maximize: Maximize = False,
    on_nonfinite: OnNonfinite = "propagate",
    grad_norm: float | None = None,
    param_copy: Tree = None,
) -> StepResult:
    r"""One step of `Momentum` on arrays, in place.

    .. math::
        g_t &= \mathrm{clip}(g_t) + \lambda\, p_{t-1} \\
        v_t &= \mu\, v_{t-1} + g_t \\
        p_t &= p_{t-1} - \eta\, v_t

    Args:
        params: One array, or a tree of arrays (nested dict, list, tuple, any iterable), updated in
            place. Dense in any dimension order and writable; float32, float64, float16 or bfloat16.
        grads: The gradients: the same tree. Any strides and float dtype; a None leaves its
            parameter (and state) alone.
        velocity: The state: the same tree, float32 or of the dtype of its parameter, with the
            parameter's strides. None (or None leaves): this is the first step, and the parameter's
            own library makes it.
        lr: Learning rate, >= 0. A number; a buffer of one element; or a schedule object (its
            `current_lr`). A function of t belongs to the optimizer objects, which count steps.
        momentum: Share of the velocity that a step keeps, in [0, 1), dimensionless.
        next_momentum: The momentum of the coming step, in [0, 1), which the look-ahead of
            Nesterov's form uses when the momentum follows a schedule. None: the same as `momentum`.
        dampening: In [0, 1]: the gradient enters the velocity with weight `1 - dampening`. Equal to
            `momentum` it makes the velocity an average of the gradients (unit gain).
        dampen_first_step: True applies `dampening` to an array's first step as well (CNTK); False
            takes `v = g` there, as PyTorch does.
        lr_in_velocity: False: `v = mu v + g; p -= lr ...` (PyTorch, braintools). True: `v = mu v -
            lr g; p += ...` (Keras, MXNet). They differ once `lr` changes.
        weight_decay: Decay coefficient, >= 0, added to the gradient after clipping (L2).
        decoupled_weight_decay: True decays the parameter itself, `p -= lr wd p`, not through the
            gradient.
        grad_clip_norm: Largest norm of all gradients of the step together, > 0: they are scaled by
            `min(1, grad_clip_norm / norm)`. `inf` measures the norm without clipping. None:
            neither.
        grad_clip_value: Largest magnitude of a gradient element, > 0, applied after the norm clip.
            None: no limit.
        rescale_grad: Multiplies every gradient before anything else is done with it, finite.
        maximize: True ascends instead of descending.
        on_nonfinite: What a step does whose gradients hold inf or NaN: compute with them
            ("propagate"), leave everything as it was ("skip"), or do so and raise
            FloatingPointError ("raise").
        grad_norm: The norm of all gradients, before `rescale_grad`, if the caller has reduced it
            already (over processes or shards): sqrt of the sum of all `sum_squares(grads)`.
        param_copy: float16 or bfloat16 arrays that receive the new parameters, rounded once.

    Returns:
        StepResult: `grad_norm`, `clip_coef`, `skipped` and `state`, the dict to splat into the next
        call (`velocity`).

    Raises:
        TypeError: If an argument is of a wrong kind, a leaf is no array, or trees differ in form.
        ValueError: If a number is out of range, or shapes, dtypes or strides disagree.
        BufferError: If an array to be written is read-only or overlaps another one.
        FloatingPointError: With `on_nonfinite="raise"`, if a gradient holds inf or NaN.
            A call that raises has changed nothing. Messages name the argument, path and value.

    Numerics:
        Arithmetic in float32 (float64 for float64), each buffer rounded once per step; the same
        bits on every instruction set and for any number of threads. In PyTorch's form they are
        those of `torch.optim.SGD` (for-loop and foreach).

    Example:
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

def fused_nesterov_step(
    params: Tree,
    grads: Tree,
    velocity: Tree = None,
    *,
    lr: LearningRateNow,
    momentum: MomentumFactor = 0.9,
    next_momentum: NextMomentum = None,
    dampening: Dampening = 0.0,
    dampen_first_step: DampenFirstStep = False,
    lr_in_velocity: LrInVelocity = False,
    weight_decay: WeightDecayNow = 0.0,
    decoupled_weight_decay: DecoupledWeightDecay = False,
    grad_clip_norm: GradClipNorm = None,
    grad_clip_value: GradClipValue = None,
    rescale_grad: RescaleGrad = 1.0,
    maximize: Maximize = False,
    on_nonfinite: OnNonfinite = "propagate",
    grad_norm: float | None = None,
    param_copy: Tree = None,
) -> StepResult:
    r"""One step of `MomentumNesterov` on arrays, in place.

    .. math::
        g_t &= \mathrm{clip}(g_t) + \lambda\, p_{t-1} \\
        v_t &= \mu\, v_{t-1} + g_t \\
        p_t &= p_{t-1} - \eta\, (g_t + \mu\, v_t)

    The arrays hold the look-ahead point, at which the gradient is taken. With a momentum that
    changes from step to step, the last :math:`\mu` is `next_momentum`.

    Args:
        params: One array, or a tree of arrays (nested dict, list, tuple, any iterable), updated in
            place. Dense in any dimension order and writable; float32, float64, float16 or bfloat16.
        grads: The gradients: the same tree. Any strides and float dtype; a None leaves its
            parameter (and state) alone.
        velocity: The state: the same tree, float32 or of the dtype of its parameter, with the
            parameter's strides. None (or None leaves): this is the first step, and the parameter's
            own library makes it.
        lr: Learning rate, >= 0. A number; a buffer of one element; or a schedule object (its
            `current_lr`). A function of t belongs to the optimizer objects, which count steps.
        momentum: Share of the velocity that a step keeps, in [0, 1), dimensionless.
        next_momentum: The momentum of the coming step, in [0, 1), which the look-ahead of
            Nesterov's form uses when the momentum follows a schedule. None: the same as `momentum`.
        dampening: In [0, 1]: the gradient enters the velocity with weight `1 - dampening`. Equal to
            `momentum` it makes the velocity an average of the gradients (unit gain).
        dampen_first_step: True applies `dampening` to an array's first step as well (CNTK); False
            takes `v = g` there, as PyTorch does.
        lr_in_velocity: False: `v = mu v + g; p -= lr ...` (PyTorch, braintools). True: `v = mu v -
            lr g; p += ...` (Keras, MXNet). They differ once `lr` changes.
        weight_decay: Decay coefficient, >= 0, added to the gradient after clipping (L2).
        decoupled_weight_decay: True decays the parameter itself, `p -= lr wd p`, not through the
            gradient.
        grad_clip_norm: Largest norm of all gradients of the step together, > 0: they are scaled by
            `min(1, grad_clip_norm / norm)`. `inf` measures the norm without clipping. None:
            neither.
        grad_clip_value: Largest magnitude of a gradient element, > 0, applied after the norm clip.
            None: no limit.
        rescale_grad: Multiplies every gradient before anything else is done with it, finite.
        maximize: True ascends instead of descending.
        on_nonfinite: What a step does whose gradients hold inf or NaN: compute with them
            ("propagate"), leave everything as it was ("skip"), or do so and raise
            FloatingPointError ("raise").
        grad_norm: The norm of all gradients, before `rescale_grad`, if the caller has reduced it
            already (over processes or shards): sqrt of the sum of all `sum_squares(grads)`.
        param_copy: float16 or bfloat16 arrays that receive the new parameters, rounded once.

    Returns:
        StepResult: `grad_norm`, `clip_coef`, `skipped` and `state`, the dict to splat into the next
        call (`velocity`).

    Raises:
        TypeError: If an argument is of a wrong kind, a leaf is no array, or trees differ in form.
        ValueError: If a number is out of range, or shapes, dtypes or strides disagree.
        BufferError: If an array to be written is read-only or overlaps another one.
        FloatingPointError: With `on_nonfinite="raise"`, if a gradient holds inf or NaN.
            A call that raises has changed nothing. Messages name the argument, path and value.

    Numerics:
        Arithmetic in float32 (float64 for float64), each buffer rounded once per step; the same
        bits on every instruction set and for any number of threads. In PyTorch's form they are
        those of `torch.optim.SGD` (for-loop and foreach).

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> p, g = np.ones(2, np.float32), np.array([1.0, -0.5], np.float32)
        >>> result = fs.fused_nesterov_step(p, g, lr=0.5, momentum=0.5)
        >>> p, result.state["velocity"]
        (array([0.25 , 1.375], dtype=float32), array([ 1. , -0.5], dtype=float32))

    References:
        Nesterov, 1983; Sutskever et al., 2013, *On the importance of initialization and momentum in
        deep learning*, eq. 3-4, in the form of `torch.optim.SGD`.
    """
