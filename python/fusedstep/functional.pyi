"""Signatures of the functional steps; written by `python -m fusedstep._stubs`."""

from typing import Any, SupportsFloat, SupportsInt

from fusedstep._core import DeviceStepResult, StepResult
from fusedstep.hyperparameters import (
    Alpha,
    Amsgrad,
    BetasNow,
    Centered,
    DampenFirstStep,
    Dampening,
    DecoupledWeightDecay,
    Eps,
    EpsInRoot,
    GradClipNorm,
    GradClipScope,
    GradClipValue,
    LearningRateNow,
    LrInVelocity,
    Maximize,
    MomentumDecay,
    MomentumFactorNow,
    Nesterov,
    NextMomentum,
    OnNonfinite,
    RescaleGrad,
    SkipGradNorm,
    Tree,
    WeightDecayNow,
)

def fused_nadam_step(
    params: Tree,
    grads: Tree,
    exp_avg: Tree = None,
    exp_avg_sq: Tree = None,
    step: SupportsInt = 0,
    mu_product: SupportsFloat = 1.0,
    *,
    lr: LearningRateNow,
    betas: BetasNow = (0.9, 0.999),
    eps: Eps = 1e-08,
    weight_decay: WeightDecayNow = 0.0,
    momentum_decay: MomentumDecay = 0.004,
    decoupled_weight_decay: DecoupledWeightDecay = False,
    grad_clip_norm: GradClipNorm = None,
    grad_clip_value: GradClipValue = None,
    rescale_grad: RescaleGrad = 1.0,
    maximize: Maximize = False,
    on_nonfinite: OnNonfinite = "propagate",
    grad_clip_scope: GradClipScope = "all",
    skip_grad_norm: SkipGradNorm = None,
    grad_norm: SupportsFloat | None = None,
    param_copy: Tree = None,
    found_inf: SupportsFloat | None = None,
    stream: Any = None,
) -> StepResult | DeviceStepResult:
    r"""One step of `NAdam` on arrays, in place.

    .. math::
        g_t &= \mathrm{clip}(g_t) + \lambda\, p_{t-1} \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t, \qquad
        s_t = \beta_2 s_{t-1} + (1 - \beta_2)\, g_t^2 \\
        \mu_t &= \beta_1 \left(1 - \tfrac12\, 0.96^{t \psi}\right), \qquad
        M_t = \mu_1 \mu_2 \cdots \mu_t \\
        p_t &= p_{t-1} - \eta\,
        \frac{\frac{1 - \mu_t}{1 - M_t}\, g_t + \frac{\mu_{t+1}}{1 - M_{t+1}}\, m_t}
        {\sqrt{s_t / (1 - \beta_2^t)} + \epsilon}

    Here :math:`\psi` is `momentum_decay`. `weight_decay` is coupled by default (added to the
    gradient, as in PyTorch); `decoupled_weight_decay=True` subtracts :math:`\eta \lambda\, p_{t-1}`
    from the parameter instead, which the page of lucid describes and none of its releases does.

    Args:
        params: One array, or a tree of arrays (nested dict, list, tuple, any iterable), updated in
            place. Dense in any dimension order and writable; float32, float64, float16 or bfloat16.
        grads: The gradients: the same tree. Any strides and float dtype; a None leaves its
            parameter (and state) alone.
        exp_avg: The state: the same tree, float32 or of its parameter's dtype, with the
            parameter's strides. None (or None leaves): this is the first step, and the parameter's
            own library makes it.
        exp_avg_sq: The state: the same tree, float32 or of its parameter's dtype, with the
            parameter's strides. None (or None leaves): this is the first step, and the parameter's
            own library makes it.
        step: Number of steps applied before this one, for all arrays of the call, >= 0. Or an array
            of one number on the device of the parameters, which a step that is applied advances
            there.
        mu_product: Product of the momenta mu_t of the steps before this one, in [0, 1]. An array,
            like `step`, if `step` is one.
        lr: Learning rate, >= 0. A number; a buffer of one element (one on the GPU of the parameters
            is read by that GPU, which checks nothing); or a schedule object (its `current_lr`). A
            function of t belongs to the optimizer objects, which count steps.
        betas: Decay rates of the averages of the gradient and of its square, each in [0, 1). The
            first one, a momentum, may be a momentum schedule.
        eps: Added to the square root in the denominator, >= 0; bounds the step.
        weight_decay: Decay coefficient, >= 0, added to the gradient after clipping (L2).
        momentum_decay: How quickly the momentum of NAdam warms up to `betas[0]` from half of it, >=
            0: `mu_t = betas[0] (1 - 0.96**(t momentum_decay) / 2)`. Dozat's report has 0.004, Keras
            3 1.
        decoupled_weight_decay: True decays the parameter itself, `p -= lr wd p`, not through the
            gradient.
        grad_clip_norm: Largest norm of all gradients of the step together (see `grad_clip_scope`),
            > 0: they are scaled by `min(1, grad_clip_norm / norm)`. `inf` measures the norm without
            clipping. None: neither.
        grad_clip_value: Largest magnitude of a gradient element, > 0, applied after the norm clip.
            None: no limit.
        rescale_grad: Multiplies every gradient before anything else is done with it, finite. A
            number, or a buffer of one element, read at every step.
        maximize: True ascends instead of descending.
        on_nonfinite: What a step does whose gradients hold inf or NaN: compute with them
            ("propagate"), leave everything as it was ("skip"), or do so and raise
            FloatingPointError ("raise").
        grad_clip_scope: Whose norm `grad_clip_norm` limits: of "all" gradients together, of each
            param "group", or of each "array". The result's `grad_norm` is that of all gradients in
            any case.
        skip_grad_norm: A step whose gradients, all together and after `rescale_grad`, have a norm
            that is larger than this (or NaN) leaves everything as it was, > 0. None or inf: none is
            skipped for its norm.
        grad_norm: The norm of all gradients, before `rescale_grad`, if the caller has reduced it
            already (over processes or shards): sqrt of the sum of all `sum_squares(grads)`.
        param_copy: float16 or bfloat16 arrays that receive the new parameters, rounded once.
        found_inf: A number or an array of one element; not 0 skips the step, as a loss scaler asks.
        stream: For arrays on a GPU, the stream on which the step runs: a handle, or an object that
            has one. None: the one on which the parameters' library works now.

    Returns:
        StepResult: `grad_norm`, `clip_coef`, `skipped`, `grad_norms`, and `state`, the dict to
        splat into the next call (`exp_avg`, `exp_avg_sq`, `step`, `mu_product`).
        For arrays on a GPU a `DeviceStepResult` with the same attributes, which waits for the step
        when one of them is read.

    Raises:
        TypeError: If an argument is of a wrong kind, a leaf is no array, or trees differ in form.
        ValueError: If a number is out of range, or shapes, dtypes or strides disagree.
        BufferError: If an array to be written is read-only or overlaps another one.
        RuntimeError: If arrays are on a GPU that cannot be used.
        FloatingPointError: With `on_nonfinite="raise"`, if a gradient holds inf or NaN.
            A call that raises has changed nothing. Messages name the argument, path and value.

    Numerics:
        Arithmetic in float32 (float64 for float64), each buffer rounded once per step; the same
        bits on every instruction set and for any number of threads. Scalars (bias corrections,
        powers, products) are computed in float64 and rounded once. The weights of an average add
        up to 1 exactly, whatever `betas` are rounded to. A float32 gradient beyond 1.8e19 overflows
        its square: the state becomes inf, and NaN at the next step, rather than freeze its element.
        Against PyTorch's float64 results: below 1e-9 (PyTorch keeps counts in float32).

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> p, g, state = np.ones(2), np.array([1.0, -0.5]), {}
        >>> for step in range(2):
        ...     state = fs.fused_nadam_step(p, g, **state, lr=0.1).state
        >>> p.round(6), state["step"], round(state["mu_product"], 6)
        (array([0.815986, 1.184014]), 2, 0.202599)

    References:
        Dozat, 2016, *Incorporating Nesterov momentum into Adam*, algorithm 2; `torch.optim.NAdam`.
        Keras 3 has `momentum_decay` = 1, MXNet one product for all arrays.
    """

def fused_adam_step(
    params: Tree,
    grads: Tree,
    exp_avg: Tree = None,
    exp_avg_sq: Tree = None,
    max_exp_avg_sq: Tree = None,
    step: SupportsInt = 0,
    *,
    lr: LearningRateNow,
    betas: BetasNow = (0.9, 0.999),
    eps: Eps = 1e-08,
    weight_decay: WeightDecayNow = 0.0,
    amsgrad: Amsgrad = False,
    decoupled_weight_decay: DecoupledWeightDecay = False,
    grad_clip_norm: GradClipNorm = None,
    grad_clip_value: GradClipValue = None,
    rescale_grad: RescaleGrad = 1.0,
    maximize: Maximize = False,
    on_nonfinite: OnNonfinite = "propagate",
    grad_clip_scope: GradClipScope = "all",
    skip_grad_norm: SkipGradNorm = None,
    grad_norm: SupportsFloat | None = None,
    param_copy: Tree = None,
    found_inf: SupportsFloat | None = None,
    stream: Any = None,
) -> StepResult | DeviceStepResult:
    r"""One step of `Adam` on arrays, in place.

    .. math::
        g_t &= \mathrm{clip}(g_t) + \lambda\, p_{t-1} \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t, \qquad
        s_t = \beta_2 s_{t-1} + (1 - \beta_2)\, g_t^2 \\
        p_t &= p_{t-1} - \eta\,
        \frac{m_t / (1 - \beta_1^t)}{\sqrt{s_t / (1 - \beta_2^t)} + \epsilon}

    With `amsgrad=True`, :math:`\max(s_1, \dots, s_t)` stands for :math:`s_t` in the last line. With
    `decoupled_weight_decay=True` it is `AdamW`.

    Args:
        params: One array, or a tree of arrays (nested dict, list, tuple, any iterable), updated in
            place. Dense in any dimension order and writable; float32, float64, float16 or bfloat16.
        grads: The gradients: the same tree. Any strides and float dtype; a None leaves its
            parameter (and state) alone.
        exp_avg: The state: the same tree, float32 or of its parameter's dtype, with the
            parameter's strides. None (or None leaves): this is the first step, and the parameter's
            own library makes it.
        exp_avg_sq: The state: the same tree, float32 or of its parameter's dtype, with the
            parameter's strides. None (or None leaves): this is the first step, and the parameter's
            own library makes it.
        max_exp_avg_sq: The state: the same tree, float32 or of its parameter's dtype, with the
            parameter's strides. None (or None leaves): this is the first step, and the parameter's
            own library makes it where its form keeps one.
        step: Number of steps applied before this one, for all arrays of the call, >= 0. Or an array
            of one number on the device of the parameters, which a step that is applied advances
            there.
        lr: Learning rate, >= 0. A number; a buffer of one element (one on the GPU of the parameters
            is read by that GPU, which checks nothing); or a schedule object (its `current_lr`). A
            function of t belongs to the optimizer objects, which count steps.
        betas: Decay rates of the averages of the gradient and of its square, each in [0, 1). The
            first one, a momentum, may be a momentum schedule.
        eps: Added to the square root in the denominator, >= 0; bounds the step.
        weight_decay: Decay coefficient, >= 0, added to the gradient after clipping (L2).
        amsgrad: True divides by the largest average of squares so far, which is kept as state.
        decoupled_weight_decay: True decays the parameter itself, `p -= lr wd p`, not through the
            gradient.
        grad_clip_norm: Largest norm of all gradients of the step together (see `grad_clip_scope`),
            > 0: they are scaled by `min(1, grad_clip_norm / norm)`. `inf` measures the norm without
            clipping. None: neither.
        grad_clip_value: Largest magnitude of a gradient element, > 0, applied after the norm clip.
            None: no limit.
        rescale_grad: Multiplies every gradient before anything else is done with it, finite. A
            number, or a buffer of one element, read at every step.
        maximize: True ascends instead of descending.
        on_nonfinite: What a step does whose gradients hold inf or NaN: compute with them
            ("propagate"), leave everything as it was ("skip"), or do so and raise
            FloatingPointError ("raise").
        grad_clip_scope: Whose norm `grad_clip_norm` limits: of "all" gradients together, of each
            param "group", or of each "array". The result's `grad_norm` is that of all gradients in
            any case.
        skip_grad_norm: A step whose gradients, all together and after `rescale_grad`, have a norm
            that is larger than this (or NaN) leaves everything as it was, > 0. None or inf: none is
            skipped for its norm.
        grad_norm: The norm of all gradients, before `rescale_grad`, if the caller has reduced it
            already (over processes or shards): sqrt of the sum of all `sum_squares(grads)`.
        param_copy: float16 or bfloat16 arrays that receive the new parameters, rounded once.
        found_inf: A number or an array of one element; not 0 skips the step, as a loss scaler asks.
        stream: For arrays on a GPU, the stream on which the step runs: a handle, or an object that
            has one. None: the one on which the parameters' library works now.

    Returns:
        StepResult: `grad_norm`, `clip_coef`, `skipped`, `grad_norms`, and `state`, the dict to
        splat into the next call (`exp_avg`, `exp_avg_sq`, `max_exp_avg_sq`, `step`).
        For arrays on a GPU a `DeviceStepResult` with the same attributes, which waits for the step
        when one of them is read.

    Raises:
        TypeError: If an argument is of a wrong kind, a leaf is no array, or trees differ in form.
        ValueError: If a number is out of range, or shapes, dtypes or strides disagree.
        BufferError: If an array to be written is read-only or overlaps another one.
        RuntimeError: If arrays are on a GPU that cannot be used.
        FloatingPointError: With `on_nonfinite="raise"`, if a gradient holds inf or NaN.
            A call that raises has changed nothing. Messages name the argument, path and value.

    Numerics:
        Arithmetic in float32 (float64 for float64), each buffer rounded once per step; the same
        bits on every instruction set and for any number of threads. Scalars (bias corrections,
        powers, products) are computed in float64 and rounded once. The weights of an average add
        up to 1 exactly, whatever `betas` are rounded to. A float32 gradient beyond 1.8e19 overflows
        its square: the state becomes inf, and NaN at the next step, rather than freeze its element.
        Against PyTorch's float64 results: below 1e-9 (PyTorch keeps counts in float32).

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> p, g, state = np.ones(2), np.array([1.0, -0.5]), {}
        >>> for step in range(2):
        ...     state = fs.fused_adam_step(p, g, **state, lr=0.1).state
        >>> p.round(6), state["step"]
        (array([0.8, 1.2]), 2)

    References:
        Kingma and Ba, 2015, *Adam: a method for stochastic optimization*; Reddi, Kale and Kumar,
        2018, *On the convergence of Adam and beyond* (amsgrad); `torch.optim.Adam`.
    """

def fused_adamw_step(
    params: Tree,
    grads: Tree,
    exp_avg: Tree = None,
    exp_avg_sq: Tree = None,
    max_exp_avg_sq: Tree = None,
    step: SupportsInt = 0,
    *,
    lr: LearningRateNow,
    betas: BetasNow = (0.9, 0.999),
    eps: Eps = 1e-08,
    weight_decay: WeightDecayNow = 0.01,
    amsgrad: Amsgrad = False,
    grad_clip_norm: GradClipNorm = None,
    grad_clip_value: GradClipValue = None,
    rescale_grad: RescaleGrad = 1.0,
    maximize: Maximize = False,
    on_nonfinite: OnNonfinite = "propagate",
    grad_clip_scope: GradClipScope = "all",
    skip_grad_norm: SkipGradNorm = None,
    grad_norm: SupportsFloat | None = None,
    param_copy: Tree = None,
    found_inf: SupportsFloat | None = None,
    stream: Any = None,
) -> StepResult | DeviceStepResult:
    r"""One step of `AdamW` on arrays, in place.

    .. math::
        g_t &= \mathrm{clip}(g_t) \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t, \qquad
        s_t = \beta_2 s_{t-1} + (1 - \beta_2)\, g_t^2 \\
        p_t &= p_{t-1} - \eta \lambda\, p_{t-1} - \eta\,
        \frac{m_t / (1 - \beta_1^t)}{\sqrt{s_t / (1 - \beta_2^t)} + \epsilon}

    With `amsgrad=True`, :math:`\max(s_1, \dots, s_t)` stands for :math:`s_t` in the last line.

    Args:
        params: One array, or a tree of arrays (nested dict, list, tuple, any iterable), updated in
            place. Dense in any dimension order and writable; float32, float64, float16 or bfloat16.
        grads: The gradients: the same tree. Any strides and float dtype; a None leaves its
            parameter (and state) alone.
        exp_avg: The state: the same tree, float32 or of its parameter's dtype, with the
            parameter's strides. None (or None leaves): this is the first step, and the parameter's
            own library makes it.
        exp_avg_sq: The state: the same tree, float32 or of its parameter's dtype, with the
            parameter's strides. None (or None leaves): this is the first step, and the parameter's
            own library makes it.
        max_exp_avg_sq: The state: the same tree, float32 or of its parameter's dtype, with the
            parameter's strides. None (or None leaves): this is the first step, and the parameter's
            own library makes it where its form keeps one.
        step: Number of steps applied before this one, for all arrays of the call, >= 0. Or an array
            of one number on the device of the parameters, which a step that is applied advances
            there.
        lr: Learning rate, >= 0. A number; a buffer of one element (one on the GPU of the parameters
            is read by that GPU, which checks nothing); or a schedule object (its `current_lr`). A
            function of t belongs to the optimizer objects, which count steps.
        betas: Decay rates of the averages of the gradient and of its square, each in [0, 1). The
            first one, a momentum, may be a momentum schedule.
        eps: Added to the square root in the denominator, >= 0; bounds the step.
        weight_decay: Decay coefficient, >= 0, added to the gradient after clipping (L2).
        amsgrad: True divides by the largest average of squares so far, which is kept as state.
        grad_clip_norm: Largest norm of all gradients of the step together (see `grad_clip_scope`),
            > 0: they are scaled by `min(1, grad_clip_norm / norm)`. `inf` measures the norm without
            clipping. None: neither.
        grad_clip_value: Largest magnitude of a gradient element, > 0, applied after the norm clip.
            None: no limit.
        rescale_grad: Multiplies every gradient before anything else is done with it, finite. A
            number, or a buffer of one element, read at every step.
        maximize: True ascends instead of descending.
        on_nonfinite: What a step does whose gradients hold inf or NaN: compute with them
            ("propagate"), leave everything as it was ("skip"), or do so and raise
            FloatingPointError ("raise").
        grad_clip_scope: Whose norm `grad_clip_norm` limits: of "all" gradients together, of each
            param "group", or of each "array". The result's `grad_norm` is that of all gradients in
            any case.
        skip_grad_norm: A step whose gradients, all together and after `rescale_grad`, have a norm
            that is larger than this (or NaN) leaves everything as it was, > 0. None or inf: none is
            skipped for its norm.
        grad_norm: The norm of all gradients, before `rescale_grad`, if the caller has reduced it
            already (over processes or shards): sqrt of the sum of all `sum_squares(grads)`.
        param_copy: float16 or bfloat16 arrays that receive the new parameters, rounded once.
        found_inf: A number or an array of one element; not 0 skips the step, as a loss scaler asks.
        stream: For arrays on a GPU, the stream on which the step runs: a handle, or an object that
            has one. None: the one on which the parameters' library works now.

    Returns:
        StepResult: `grad_norm`, `clip_coef`, `skipped`, `grad_norms`, and `state`, the dict to
        splat into the next call (`exp_avg`, `exp_avg_sq`, `max_exp_avg_sq`, `step`).
        For arrays on a GPU a `DeviceStepResult` with the same attributes, which waits for the step
        when one of them is read.

    Raises:
        TypeError: If an argument is of a wrong kind, a leaf is no array, or trees differ in form.
        ValueError: If a number is out of range, or shapes, dtypes or strides disagree.
        BufferError: If an array to be written is read-only or overlaps another one.
        RuntimeError: If arrays are on a GPU that cannot be used.
        FloatingPointError: With `on_nonfinite="raise"`, if a gradient holds inf or NaN.
            A call that raises has changed nothing. Messages name the argument, path and value.

    Numerics:
        Arithmetic in float32 (float64 for float64), each buffer rounded once per step; the same
        bits on every instruction set and for any number of threads. Scalars (bias corrections,
        powers, products) are computed in float64 and rounded once. The weights of an average add
        up to 1 exactly, whatever `betas` are rounded to. A float32 gradient beyond 1.8e19 overflows
        its square: the state becomes inf, and NaN at the next step, rather than freeze its element.
        Against PyTorch's float64 results: below 1e-9 (PyTorch keeps counts in float32).

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> p, g = np.ones(2), np.array([1.0, -0.5])
        >>> result = fs.fused_adamw_step(p, g, lr=0.1, weight_decay=0.5)
        >>> p.round(6)
        array([0.85, 1.05])

    References:
        Loshchilov and Hutter, 2019, *Decoupled weight decay regularization*, algorithm 2 with the
        learning rate in the decay; `torch.optim.AdamW`.
    """

def fused_rmsprop_step(
    params: Tree,
    grads: Tree,
    square_avg: Tree = None,
    grad_avg: Tree = None,
    momentum_buffer: Tree = None,
    *,
    lr: LearningRateNow,
    alpha: Alpha = 0.99,
    eps: Eps = 1e-08,
    weight_decay: WeightDecayNow = 0.0,
    momentum: MomentumFactorNow = 0.0,
    centered: Centered = False,
    next_momentum: NextMomentum = None,
    nesterov: Nesterov = False,
    eps_in_root: EpsInRoot = False,
    decoupled_weight_decay: DecoupledWeightDecay = False,
    grad_clip_norm: GradClipNorm = None,
    grad_clip_value: GradClipValue = None,
    rescale_grad: RescaleGrad = 1.0,
    maximize: Maximize = False,
    on_nonfinite: OnNonfinite = "propagate",
    grad_clip_scope: GradClipScope = "all",
    skip_grad_norm: SkipGradNorm = None,
    grad_norm: SupportsFloat | None = None,
    param_copy: Tree = None,
    found_inf: SupportsFloat | None = None,
    stream: Any = None,
) -> StepResult | DeviceStepResult:
    r"""One step of `RMSprop` on arrays, in place.

    .. math::
        g_t &= \mathrm{clip}(g_t) + \lambda\, p_{t-1} \\
        s_t &= \alpha s_{t-1} + (1 - \alpha)\, g_t^2 \\
        u_t &= \frac{g_t}{\sqrt{s_t} + \epsilon} \\
        v_t &= \mu\, v_{t-1} + u_t \\
        p_t &= p_{t-1} - \eta\, v_t

    With `eps_in_root=True` the denominator is :math:`\sqrt{s_t + \epsilon}`. Without momentum
    :math:`v_t = u_t`. With `nesterov=True` the step is :math:`u_t + \mu\, v_t`.
    With `centered=True` the root is that of :math:`s_t - a_t^2`, where :math:`a_t` is the average
    of the gradients; where rounding makes it negative it counts as 0 (PyTorch gets NaN). On a
    gradient that never changes that variance goes to 0: :math:`\epsilon` alone bounds the step.

    Args:
        params: One array, or a tree of arrays (nested dict, list, tuple, any iterable), updated in
            place. Dense in any dimension order and writable; float32, float64, float16 or bfloat16.
        grads: The gradients: the same tree. Any strides and float dtype; a None leaves its
            parameter (and state) alone.
        square_avg: The state: the same tree, float32 or of its parameter's dtype, with the
            parameter's strides. None (or None leaves): this is the first step, and the parameter's
            own library makes it.
        grad_avg: The state: the same tree, float32 or of its parameter's dtype, with the
            parameter's strides. None (or None leaves): this is the first step, and the parameter's
            own library makes it where its form keeps one.
        momentum_buffer: The state: the same tree, float32 or of its parameter's dtype, with the
            parameter's strides. None (or None leaves): this is the first step, and the parameter's
            own library makes it where its form keeps one.
        lr: Learning rate, >= 0. A number; a buffer of one element (one on the GPU of the parameters
            is read by that GPU, which checks nothing); or a schedule object (its `current_lr`). A
            function of t belongs to the optimizer objects, which count steps.
        alpha: Decay rate of the averages of the gradient's square, in [0, 1).
        eps: Added to the square root in the denominator, >= 0; bounds the step.
        weight_decay: Decay coefficient, >= 0, added to the gradient after clipping (L2).
        momentum: Share of the velocity that a step keeps, in [0, 1), dimensionless. A number; a
            buffer of one element; or a momentum schedule (its `current_momentum`, and
            `next_momentum` as the look-ahead of Nesterov's form).
        centered: True divides by the standard deviation: the average gradient is kept as state.
        next_momentum: The momentum of the coming step, in [0, 1), which the look-ahead of
            Nesterov's form uses when the momentum changes from step to step. None: what the
            momentum's schedule or function says, else the same as `momentum`.
        nesterov: True steps along `g + mu v` instead of along `v`.
        eps_in_root: True adds `eps` under the square root (TensorFlow, Keras, optax, braintools),
            False to the root (PyTorch).
        decoupled_weight_decay: True decays the parameter itself, `p -= lr wd p`, not through the
            gradient.
        grad_clip_norm: Largest norm of all gradients of the step together (see `grad_clip_scope`),
            > 0: they are scaled by `min(1, grad_clip_norm / norm)`. `inf` measures the norm without
            clipping. None: neither.
        grad_clip_value: Largest magnitude of a gradient element, > 0, applied after the norm clip.
            None: no limit.
        rescale_grad: Multiplies every gradient before anything else is done with it, finite. A
            number, or a buffer of one element, read at every step.
        maximize: True ascends instead of descending.
        on_nonfinite: What a step does whose gradients hold inf or NaN: compute with them
            ("propagate"), leave everything as it was ("skip"), or do so and raise
            FloatingPointError ("raise").
        grad_clip_scope: Whose norm `grad_clip_norm` limits: of "all" gradients together, of each
            param "group", or of each "array". The result's `grad_norm` is that of all gradients in
            any case.
        skip_grad_norm: A step whose gradients, all together and after `rescale_grad`, have a norm
            that is larger than this (or NaN) leaves everything as it was, > 0. None or inf: none is
            skipped for its norm.
        grad_norm: The norm of all gradients, before `rescale_grad`, if the caller has reduced it
            already (over processes or shards): sqrt of the sum of all `sum_squares(grads)`.
        param_copy: float16 or bfloat16 arrays that receive the new parameters, rounded once.
        found_inf: A number or an array of one element; not 0 skips the step, as a loss scaler asks.
        stream: For arrays on a GPU, the stream on which the step runs: a handle, or an object that
            has one. None: the one on which the parameters' library works now.

    Returns:
        StepResult: `grad_norm`, `clip_coef`, `skipped`, `grad_norms`, and `state`, the dict to
        splat into the next call (`square_avg`, `grad_avg`, `momentum_buffer`).
        For arrays on a GPU a `DeviceStepResult` with the same attributes, which waits for the step
        when one of them is read.

    Raises:
        TypeError: If an argument is of a wrong kind, a leaf is no array, or trees differ in form.
        ValueError: If a number is out of range, or shapes, dtypes or strides disagree.
        BufferError: If an array to be written is read-only or overlaps another one.
        RuntimeError: If arrays are on a GPU that cannot be used.
        FloatingPointError: With `on_nonfinite="raise"`, if a gradient holds inf or NaN.
            A call that raises has changed nothing. Messages name the argument, path and value.

    Numerics:
        Arithmetic in float32 (float64 for float64), each buffer rounded once per step; the same
        bits on every instruction set and for any number of threads. Scalars (bias corrections,
        powers, products) are computed in float64 and rounded once. The weights of an average add
        up to 1 exactly, whatever `betas` are rounded to. A float32 gradient beyond 1.8e19 overflows
        its square: the state becomes inf, and NaN at the next step, rather than freeze its element.
        Against PyTorch's float64 results: below 1e-9 (PyTorch keeps counts in float32).

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> p, g = np.ones(2), np.array([1.0, -0.5])
        >>> result = fs.fused_rmsprop_step(p, g, lr=0.1, alpha=0.75)
        >>> p.round(6), result.state["square_avg"]
        (array([0.8, 1.2]), array([0.25  , 0.0625]))

    References:
        Hinton, 2012, lecture 6e; Graves, 2013, *Generating sequences with recurrent neural
        networks*, eq. 38-45 (centered); `torch.optim.RMSprop`.
    """

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
    grad_clip_scope: GradClipScope = "all",
    skip_grad_norm: SkipGradNorm = None,
    grad_norm: SupportsFloat | None = None,
    param_copy: Tree = None,
    found_inf: SupportsFloat | None = None,
    stream: Any = None,
) -> StepResult | DeviceStepResult:
    r"""One step of `SGD` on arrays, in place.

    .. math::
        g_t &= \mathrm{clip}(g_t) + \lambda\, p_{t-1} \\
        p_t &= p_{t-1} - \eta\, g_t

    Args:
        params: One array, or a tree of arrays (nested dict, list, tuple, any iterable), updated in
            place. Dense in any dimension order and writable; float32, float64, float16 or bfloat16.
        grads: The gradients: the same tree. Any strides and float dtype; a None leaves its
            parameter (and state) alone.
        lr: Learning rate, >= 0. A number; a buffer of one element (one on the GPU of the parameters
            is read by that GPU, which checks nothing); or a schedule object (its `current_lr`). A
            function of t belongs to the optimizer objects, which count steps.
        weight_decay: Decay coefficient, >= 0, added to the gradient after clipping (L2).
        decoupled_weight_decay: True decays the parameter itself, `p -= lr wd p`, not through the
            gradient.
        grad_clip_norm: Largest norm of all gradients of the step together (see `grad_clip_scope`),
            > 0: they are scaled by `min(1, grad_clip_norm / norm)`. `inf` measures the norm without
            clipping. None: neither.
        grad_clip_value: Largest magnitude of a gradient element, > 0, applied after the norm clip.
            None: no limit.
        rescale_grad: Multiplies every gradient before anything else is done with it, finite. A
            number, or a buffer of one element, read at every step.
        maximize: True ascends instead of descending.
        on_nonfinite: What a step does whose gradients hold inf or NaN: compute with them
            ("propagate"), leave everything as it was ("skip"), or do so and raise
            FloatingPointError ("raise").
        grad_clip_scope: Whose norm `grad_clip_norm` limits: of "all" gradients together, of each
            param "group", or of each "array". The result's `grad_norm` is that of all gradients in
            any case.
        skip_grad_norm: A step whose gradients, all together and after `rescale_grad`, have a norm
            that is larger than this (or NaN) leaves everything as it was, > 0. None or inf: none is
            skipped for its norm.
        grad_norm: The norm of all gradients, before `rescale_grad`, if the caller has reduced it
            already (over processes or shards): sqrt of the sum of all `sum_squares(grads)`.
        param_copy: float16 or bfloat16 arrays that receive the new parameters, rounded once.
        found_inf: A number or an array of one element; not 0 skips the step, as a loss scaler asks.
        stream: For arrays on a GPU, the stream on which the step runs: a handle, or an object that
            has one. None: the one on which the parameters' library works now.

    Returns:
        StepResult: `grad_norm`, `clip_coef`, `skipped`, `grad_norms`, and `state`, the dict to
        splat into the next call (empty: the rule keeps none).
        For arrays on a GPU a `DeviceStepResult` with the same attributes, which waits for the step
        when one of them is read.

    Raises:
        TypeError: If an argument is of a wrong kind, a leaf is no array, or trees differ in form.
        ValueError: If a number is out of range, or shapes, dtypes or strides disagree.
        BufferError: If an array to be written is read-only or overlaps another one.
        RuntimeError: If arrays are on a GPU that cannot be used.
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
    momentum: MomentumFactorNow = 0.9,
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
    grad_clip_scope: GradClipScope = "all",
    skip_grad_norm: SkipGradNorm = None,
    grad_norm: SupportsFloat | None = None,
    param_copy: Tree = None,
    found_inf: SupportsFloat | None = None,
    stream: Any = None,
) -> StepResult | DeviceStepResult:
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
        velocity: The state: the same tree, float32 or of its parameter's dtype, with the
            parameter's strides. None (or None leaves): this is the first step, and the parameter's
            own library makes it.
        lr: Learning rate, >= 0. A number; a buffer of one element (one on the GPU of the parameters
            is read by that GPU, which checks nothing); or a schedule object (its `current_lr`). A
            function of t belongs to the optimizer objects, which count steps.
        momentum: Share of the velocity that a step keeps, in [0, 1), dimensionless. A number; a
            buffer of one element; or a momentum schedule (its `current_momentum`, and
            `next_momentum` as the look-ahead of Nesterov's form).
        next_momentum: The momentum of the coming step, in [0, 1), which the look-ahead of
            Nesterov's form uses when the momentum changes from step to step. None: what the
            momentum's schedule or function says, else the same as `momentum`.
        dampening: In [0, 1]: the gradient enters the velocity with weight `1 - dampening`. Equal to
            `momentum` it makes the velocity an average of the gradients (unit gain).
        dampen_first_step: True applies `dampening` to an array's first step as well (CNTK); False
            takes `v = g` there, as PyTorch does.
        lr_in_velocity: False: `v = mu v + g; p -= lr ...` (PyTorch, braintools). True: `v = mu v -
            lr g; p += ...` (Keras, MXNet). They differ once `lr` changes.
        weight_decay: Decay coefficient, >= 0, added to the gradient after clipping (L2).
        decoupled_weight_decay: True decays the parameter itself, `p -= lr wd p`, not through the
            gradient.
        grad_clip_norm: Largest norm of all gradients of the step together (see `grad_clip_scope`),
            > 0: they are scaled by `min(1, grad_clip_norm / norm)`. `inf` measures the norm without
            clipping. None: neither.
        grad_clip_value: Largest magnitude of a gradient element, > 0, applied after the norm clip.
            None: no limit.
        rescale_grad: Multiplies every gradient before anything else is done with it, finite. A
            number, or a buffer of one element, read at every step.
        maximize: True ascends instead of descending.
        on_nonfinite: What a step does whose gradients hold inf or NaN: compute with them
            ("propagate"), leave everything as it was ("skip"), or do so and raise
            FloatingPointError ("raise").
        grad_clip_scope: Whose norm `grad_clip_norm` limits: of "all" gradients together, of each
            param "group", or of each "array". The result's `grad_norm` is that of all gradients in
            any case.
        skip_grad_norm: A step whose gradients, all together and after `rescale_grad`, have a norm
            that is larger than this (or NaN) leaves everything as it was, > 0. None or inf: none is
            skipped for its norm.
        grad_norm: The norm of all gradients, before `rescale_grad`, if the caller has reduced it
            already (over processes or shards): sqrt of the sum of all `sum_squares(grads)`.
        param_copy: float16 or bfloat16 arrays that receive the new parameters, rounded once.
        found_inf: A number or an array of one element; not 0 skips the step, as a loss scaler asks.
        stream: For arrays on a GPU, the stream on which the step runs: a handle, or an object that
            has one. None: the one on which the parameters' library works now.

    Returns:
        StepResult: `grad_norm`, `clip_coef`, `skipped`, `grad_norms`, and `state`, the dict to
        splat into the next call (`velocity`).
        For arrays on a GPU a `DeviceStepResult` with the same attributes, which waits for the step
        when one of them is read.

    Raises:
        TypeError: If an argument is of a wrong kind, a leaf is no array, or trees differ in form.
        ValueError: If a number is out of range, or shapes, dtypes or strides disagree.
        BufferError: If an array to be written is read-only or overlaps another one.
        RuntimeError: If arrays are on a GPU that cannot be used.
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
    momentum: MomentumFactorNow = 0.9,
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
    grad_clip_scope: GradClipScope = "all",
    skip_grad_norm: SkipGradNorm = None,
    grad_norm: SupportsFloat | None = None,
    param_copy: Tree = None,
    found_inf: SupportsFloat | None = None,
    stream: Any = None,
) -> StepResult | DeviceStepResult:
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
        velocity: The state: the same tree, float32 or of its parameter's dtype, with the
            parameter's strides. None (or None leaves): this is the first step, and the parameter's
            own library makes it.
        lr: Learning rate, >= 0. A number; a buffer of one element (one on the GPU of the parameters
            is read by that GPU, which checks nothing); or a schedule object (its `current_lr`). A
            function of t belongs to the optimizer objects, which count steps.
        momentum: Share of the velocity that a step keeps, in [0, 1), dimensionless. A number; a
            buffer of one element; or a momentum schedule (its `current_momentum`, and
            `next_momentum` as the look-ahead of Nesterov's form).
        next_momentum: The momentum of the coming step, in [0, 1), which the look-ahead of
            Nesterov's form uses when the momentum changes from step to step. None: what the
            momentum's schedule or function says, else the same as `momentum`.
        dampening: In [0, 1]: the gradient enters the velocity with weight `1 - dampening`. Equal to
            `momentum` it makes the velocity an average of the gradients (unit gain).
        dampen_first_step: True applies `dampening` to an array's first step as well (CNTK); False
            takes `v = g` there, as PyTorch does.
        lr_in_velocity: False: `v = mu v + g; p -= lr ...` (PyTorch, braintools). True: `v = mu v -
            lr g; p += ...` (Keras, MXNet). They differ once `lr` changes.
        weight_decay: Decay coefficient, >= 0, added to the gradient after clipping (L2).
        decoupled_weight_decay: True decays the parameter itself, `p -= lr wd p`, not through the
            gradient.
        grad_clip_norm: Largest norm of all gradients of the step together (see `grad_clip_scope`),
            > 0: they are scaled by `min(1, grad_clip_norm / norm)`. `inf` measures the norm without
            clipping. None: neither.
        grad_clip_value: Largest magnitude of a gradient element, > 0, applied after the norm clip.
            None: no limit.
        rescale_grad: Multiplies every gradient before anything else is done with it, finite. A
            number, or a buffer of one element, read at every step.
        maximize: True ascends instead of descending.
        on_nonfinite: What a step does whose gradients hold inf or NaN: compute with them
            ("propagate"), leave everything as it was ("skip"), or do so and raise
            FloatingPointError ("raise").
        grad_clip_scope: Whose norm `grad_clip_norm` limits: of "all" gradients together, of each
            param "group", or of each "array". The result's `grad_norm` is that of all gradients in
            any case.
        skip_grad_norm: A step whose gradients, all together and after `rescale_grad`, have a norm
            that is larger than this (or NaN) leaves everything as it was, > 0. None or inf: none is
            skipped for its norm.
        grad_norm: The norm of all gradients, before `rescale_grad`, if the caller has reduced it
            already (over processes or shards): sqrt of the sum of all `sum_squares(grads)`.
        param_copy: float16 or bfloat16 arrays that receive the new parameters, rounded once.
        found_inf: A number or an array of one element; not 0 skips the step, as a loss scaler asks.
        stream: For arrays on a GPU, the stream on which the step runs: a handle, or an object that
            has one. None: the one on which the parameters' library works now.

    Returns:
        StepResult: `grad_norm`, `clip_coef`, `skipped`, `grad_norms`, and `state`, the dict to
        splat into the next call (`velocity`).
        For arrays on a GPU a `DeviceStepResult` with the same attributes, which waits for the step
        when one of them is read.

    Raises:
        TypeError: If an argument is of a wrong kind, a leaf is no array, or trees differ in form.
        ValueError: If a number is out of range, or shapes, dtypes or strides disagree.
        BufferError: If an array to be written is read-only or overlaps another one.
        RuntimeError: If arrays are on a GPU that cannot be used.
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
