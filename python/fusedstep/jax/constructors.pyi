"""Signatures of the transforms; written by `python -m fusedstep.jax._stubs`."""

from typing import Any

from fusedstep.hyperparameters import (
    Alpha,
    Amsgrad,
    Betas,
    Centered,
    DampenFirstStep,
    Dampening,
    DecoupledWeightDecay,
    Eps,
    EpsInRoot,
    GradClipNorm,
    GradClipScope,
    GradClipValue,
    LearningRate,
    LrInVelocity,
    Maximize,
    MomentumDecay,
    MomentumFactor,
    Nesterov,
    NextMomentum,
    OnNonfinite,
    RescaleGrad,
    SkipGradNorm,
    WeightDecay,
)
from fusedstep.jax.transform import Transform

def nadam(
    lr: LearningRate | Any = 0.002,
    *,
    betas: Betas | Any = (0.9, 0.999),
    eps: Eps | Any = 1e-08,
    weight_decay: WeightDecay | Any = 0.0,
    momentum_decay: MomentumDecay | Any = 0.004,
    decoupled_weight_decay: DecoupledWeightDecay = False,
    grad_clip_norm: GradClipNorm | Any = None,
    grad_clip_value: GradClipValue | Any = None,
    rescale_grad: RescaleGrad | Any = 1.0,
    maximize: Maximize = False,
    on_nonfinite: OnNonfinite = "propagate",
    grad_clip_scope: GradClipScope = "all",
    skip_grad_norm: SkipGradNorm | Any = None,
) -> Transform:
    r"""`NAdam` for JAX: a transform of pytrees.

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
        lr: Learning rate, >= 0. A number; an array of one; or a function of the number of steps
            applied so far (int32, traced), as optax's schedules are.
        betas: Decay rates of the averages of the gradient and of its square, each in [0, 1): a pair
            of numbers or arrays of one. The first, a momentum, may be a function of the number of
            steps applied so far.
        eps: Added to the square root in the denominator, >= 0; bounds the step.
        weight_decay: Decay coefficient, >= 0, added to the gradient after clipping (L2). Or a
            function `(path, array) -> float`, evaluated for each array when a program is compiled.
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
            ("propagate"), or leave everything as it was ("skip"), which the device decides.
        grad_clip_scope: Whose norm `grad_clip_norm` limits: of "all" gradients together, or of each
            "array". `state.grad_norm` is that of all gradients in any case.
        skip_grad_norm: A step whose gradients, all together and after `rescale_grad`, have a norm
            that is larger than this (or NaN) leaves everything as it was, > 0. None or inf: none is
            skipped for its norm.

        Every number may be an array of one element, whose value only the device knows; its range
        is not checked then.

    Returns:
        Transform: `init(params)`, `step(grads, state, params)`, `sharded(mesh, specs)`, `optax()`.

    Raises:
        TypeError: If an argument is of a wrong kind; the message names it and what it was.
        ValueError: If a number is out of range, or an option has no meaning in a compiled program.

    Numerics:
        The bits of `fusedstep.NAdam` for the same numbers. Python's numbers are exact
        float64 constants, arrays are widened exactly. Denormals are kept, which XLA flushes.

    Example:
        >>> import jax, jax.numpy as jnp, fusedstep.jax as fj
        >>> tx = fj.nadam(lr=0.1)
        >>> params = {"w": jnp.ones(2)}
        >>> state = tx.init(params)
        >>> step = jax.jit(tx.step, donate_argnums=(1, 2))
        >>> params, state = step({"w": jnp.ones(2)}, state, params)
        >>> int(state.step), round(float(state.lr), 6)
        (1, 0.1)

    References:
        Dozat, 2016, *Incorporating Nesterov momentum into Adam*, algorithm 2; `torch.optim.NAdam`.
        Keras 3 has `momentum_decay` = 1, MXNet one product for all arrays.
    """

def adam(
    lr: LearningRate | Any = 0.001,
    *,
    betas: Betas | Any = (0.9, 0.999),
    eps: Eps | Any = 1e-08,
    weight_decay: WeightDecay | Any = 0.0,
    amsgrad: Amsgrad = False,
    decoupled_weight_decay: DecoupledWeightDecay = False,
    grad_clip_norm: GradClipNorm | Any = None,
    grad_clip_value: GradClipValue | Any = None,
    rescale_grad: RescaleGrad | Any = 1.0,
    maximize: Maximize = False,
    on_nonfinite: OnNonfinite = "propagate",
    grad_clip_scope: GradClipScope = "all",
    skip_grad_norm: SkipGradNorm | Any = None,
) -> Transform:
    r"""`Adam` for JAX: a transform of pytrees.

    .. math::
        g_t &= \mathrm{clip}(g_t) + \lambda\, p_{t-1} \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t, \qquad
        s_t = \beta_2 s_{t-1} + (1 - \beta_2)\, g_t^2 \\
        p_t &= p_{t-1} - \eta\,
        \frac{m_t / (1 - \beta_1^t)}{\sqrt{s_t / (1 - \beta_2^t)} + \epsilon}

    With `amsgrad=True`, :math:`\max(s_1, \dots, s_t)` stands for :math:`s_t` in the last line. With
    `decoupled_weight_decay=True` it is `AdamW`.

    Args:
        lr: Learning rate, >= 0. A number; an array of one; or a function of the number of steps
            applied so far (int32, traced), as optax's schedules are.
        betas: Decay rates of the averages of the gradient and of its square, each in [0, 1): a pair
            of numbers or arrays of one. The first, a momentum, may be a function of the number of
            steps applied so far.
        eps: Added to the square root in the denominator, >= 0; bounds the step.
        weight_decay: Decay coefficient, >= 0, added to the gradient after clipping (L2). Or a
            function `(path, array) -> float`, evaluated for each array when a program is compiled.
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
            ("propagate"), or leave everything as it was ("skip"), which the device decides.
        grad_clip_scope: Whose norm `grad_clip_norm` limits: of "all" gradients together, or of each
            "array". `state.grad_norm` is that of all gradients in any case.
        skip_grad_norm: A step whose gradients, all together and after `rescale_grad`, have a norm
            that is larger than this (or NaN) leaves everything as it was, > 0. None or inf: none is
            skipped for its norm.

        Every number may be an array of one element, whose value only the device knows; its range
        is not checked then.

    Returns:
        Transform: `init(params)`, `step(grads, state, params)`, `sharded(mesh, specs)`, `optax()`.

    Raises:
        TypeError: If an argument is of a wrong kind; the message names it and what it was.
        ValueError: If a number is out of range, or an option has no meaning in a compiled program.

    Numerics:
        The bits of `fusedstep.Adam` for the same numbers. Python's numbers are exact
        float64 constants, arrays are widened exactly. Denormals are kept, which XLA flushes.

    Example:
        >>> import jax, jax.numpy as jnp, fusedstep.jax as fj
        >>> tx = fj.adam(lr=0.1)
        >>> params = {"w": jnp.ones(2)}
        >>> state = tx.init(params)
        >>> step = jax.jit(tx.step, donate_argnums=(1, 2))
        >>> params, state = step({"w": jnp.ones(2)}, state, params)
        >>> int(state.step), round(float(state.lr), 6)
        (1, 0.1)

    References:
        Kingma and Ba, 2015, *Adam: a method for stochastic optimization*; Reddi, Kale and Kumar,
        2018, *On the convergence of Adam and beyond* (amsgrad); `torch.optim.Adam`.
    """

def adamw(
    lr: LearningRate | Any = 0.001,
    *,
    betas: Betas | Any = (0.9, 0.999),
    eps: Eps | Any = 1e-08,
    weight_decay: WeightDecay | Any = 0.01,
    amsgrad: Amsgrad = False,
    grad_clip_norm: GradClipNorm | Any = None,
    grad_clip_value: GradClipValue | Any = None,
    rescale_grad: RescaleGrad | Any = 1.0,
    maximize: Maximize = False,
    on_nonfinite: OnNonfinite = "propagate",
    grad_clip_scope: GradClipScope = "all",
    skip_grad_norm: SkipGradNorm | Any = None,
) -> Transform:
    r"""`AdamW` for JAX: a transform of pytrees.

    .. math::
        g_t &= \mathrm{clip}(g_t) \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t, \qquad
        s_t = \beta_2 s_{t-1} + (1 - \beta_2)\, g_t^2 \\
        p_t &= p_{t-1} - \eta \lambda\, p_{t-1} - \eta\,
        \frac{m_t / (1 - \beta_1^t)}{\sqrt{s_t / (1 - \beta_2^t)} + \epsilon}

    With `amsgrad=True`, :math:`\max(s_1, \dots, s_t)` stands for :math:`s_t` in the last line.

    Args:
        lr: Learning rate, >= 0. A number; an array of one; or a function of the number of steps
            applied so far (int32, traced), as optax's schedules are.
        betas: Decay rates of the averages of the gradient and of its square, each in [0, 1): a pair
            of numbers or arrays of one. The first, a momentum, may be a function of the number of
            steps applied so far.
        eps: Added to the square root in the denominator, >= 0; bounds the step.
        weight_decay: Decay coefficient, >= 0, added to the gradient after clipping (L2). Or a
            function `(path, array) -> float`, evaluated for each array when a program is compiled.
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
            ("propagate"), or leave everything as it was ("skip"), which the device decides.
        grad_clip_scope: Whose norm `grad_clip_norm` limits: of "all" gradients together, or of each
            "array". `state.grad_norm` is that of all gradients in any case.
        skip_grad_norm: A step whose gradients, all together and after `rescale_grad`, have a norm
            that is larger than this (or NaN) leaves everything as it was, > 0. None or inf: none is
            skipped for its norm.

        Every number may be an array of one element, whose value only the device knows; its range
        is not checked then.

    Returns:
        Transform: `init(params)`, `step(grads, state, params)`, `sharded(mesh, specs)`, `optax()`.

    Raises:
        TypeError: If an argument is of a wrong kind; the message names it and what it was.
        ValueError: If a number is out of range, or an option has no meaning in a compiled program.

    Numerics:
        The bits of `fusedstep.AdamW` for the same numbers. Python's numbers are exact
        float64 constants, arrays are widened exactly. Denormals are kept, which XLA flushes.

    Example:
        >>> import jax, jax.numpy as jnp, fusedstep.jax as fj
        >>> tx = fj.adamw(lr=0.1)
        >>> params = {"w": jnp.ones(2)}
        >>> state = tx.init(params)
        >>> step = jax.jit(tx.step, donate_argnums=(1, 2))
        >>> params, state = step({"w": jnp.ones(2)}, state, params)
        >>> int(state.step), round(float(state.lr), 6)
        (1, 0.1)

    References:
        Loshchilov and Hutter, 2019, *Decoupled weight decay regularization*, algorithm 2 with the
        learning rate in the decay; `torch.optim.AdamW`.
    """

def rmsprop(
    lr: LearningRate | Any = 0.01,
    *,
    alpha: Alpha | Any = 0.99,
    eps: Eps | Any = 1e-08,
    weight_decay: WeightDecay | Any = 0.0,
    momentum: MomentumFactor | Any = 0.0,
    centered: Centered = False,
    next_momentum: NextMomentum | Any = None,
    nesterov: Nesterov = False,
    eps_in_root: EpsInRoot = False,
    decoupled_weight_decay: DecoupledWeightDecay = False,
    grad_clip_norm: GradClipNorm | Any = None,
    grad_clip_value: GradClipValue | Any = None,
    rescale_grad: RescaleGrad | Any = 1.0,
    maximize: Maximize = False,
    on_nonfinite: OnNonfinite = "propagate",
    grad_clip_scope: GradClipScope = "all",
    skip_grad_norm: SkipGradNorm | Any = None,
) -> Transform:
    r"""`RMSprop` for JAX: a transform of pytrees.

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
        lr: Learning rate, >= 0. A number; an array of one; or a function of the number of steps
            applied so far (int32, traced), as optax's schedules are.
        alpha: Decay rate of the averages of the gradient's square, in [0, 1).
        eps: Added to the square root in the denominator, >= 0; bounds the step.
        weight_decay: Decay coefficient, >= 0, added to the gradient after clipping (L2). Or a
            function `(path, array) -> float`, evaluated for each array when a program is compiled.
        momentum: Share of the velocity that a step keeps, in [0, 1), dimensionless. A number; an
            array of one; or a function of the number of steps applied so far, whose next value is
            the look-ahead of Nesterov's form.
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
            ("propagate"), or leave everything as it was ("skip"), which the device decides.
        grad_clip_scope: Whose norm `grad_clip_norm` limits: of "all" gradients together, or of each
            "array". `state.grad_norm` is that of all gradients in any case.
        skip_grad_norm: A step whose gradients, all together and after `rescale_grad`, have a norm
            that is larger than this (or NaN) leaves everything as it was, > 0. None or inf: none is
            skipped for its norm.

        Every number may be an array of one element, whose value only the device knows; its range
        is not checked then.

    Returns:
        Transform: `init(params)`, `step(grads, state, params)`, `sharded(mesh, specs)`, `optax()`.

    Raises:
        TypeError: If an argument is of a wrong kind; the message names it and what it was.
        ValueError: If a number is out of range, or an option has no meaning in a compiled program.

    Numerics:
        The bits of `fusedstep.RMSprop` for the same numbers. Python's numbers are exact
        float64 constants, arrays are widened exactly. Denormals are kept, which XLA flushes.

    Example:
        >>> import jax, jax.numpy as jnp, fusedstep.jax as fj
        >>> tx = fj.rmsprop(lr=0.1)
        >>> params = {"w": jnp.ones(2)}
        >>> state = tx.init(params)
        >>> step = jax.jit(tx.step, donate_argnums=(1, 2))
        >>> params, state = step({"w": jnp.ones(2)}, state, params)
        >>> int(state.step), round(float(state.lr), 6)
        (1, 0.1)

    References:
        Hinton, 2012, lecture 6e; Graves, 2013, *Generating sequences with recurrent neural
        networks*, eq. 38-45 (centered); `torch.optim.RMSprop`.
    """

def sgd(
    lr: LearningRate | Any = 0.001,
    *,
    momentum: MomentumFactor | Any = 0.0,
    dampening: Dampening | Any = 0.0,
    nesterov: Nesterov = False,
    weight_decay: WeightDecay | Any = 0.0,
    decoupled_weight_decay: DecoupledWeightDecay = False,
    grad_clip_norm: GradClipNorm | Any = None,
    grad_clip_value: GradClipValue | Any = None,
    rescale_grad: RescaleGrad | Any = 1.0,
    maximize: Maximize = False,
    on_nonfinite: OnNonfinite = "propagate",
    grad_clip_scope: GradClipScope = "all",
    skip_grad_norm: SkipGradNorm | Any = None,
) -> Transform:
    r"""`SGD` for JAX: a transform of pytrees.

    .. math::
        g_t &= \mathrm{clip}(g_t) + \lambda\, p_{t-1} \\
        p_t &= p_{t-1} - \eta\, g_t

    Args:
        lr: Learning rate, >= 0. A number; an array of one; or a function of the number of steps
            applied so far (int32, traced), as optax's schedules are.
        momentum: Share of the velocity that a step keeps, in [0, 1), dimensionless. A number; an
            array of one; or a function of the number of steps applied so far, whose next value is
            the look-ahead of Nesterov's form.
        dampening: In [0, 1]: the gradient enters the velocity with weight `1 - dampening`. Equal to
            `momentum` it makes the velocity an average of the gradients (unit gain).
        nesterov: True steps along `g + mu v` instead of along `v`.
        weight_decay: Decay coefficient, >= 0, added to the gradient after clipping (L2). Or a
            function `(path, array) -> float`, evaluated for each array when a program is compiled.
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
            ("propagate"), or leave everything as it was ("skip"), which the device decides.
        grad_clip_scope: Whose norm `grad_clip_norm` limits: of "all" gradients together, or of each
            "array". `state.grad_norm` is that of all gradients in any case.
        skip_grad_norm: A step whose gradients, all together and after `rescale_grad`, have a norm
            that is larger than this (or NaN) leaves everything as it was, > 0. None or inf: none is
            skipped for its norm.

        Every number may be an array of one element, whose value only the device knows; its range
        is not checked then.

    Returns:
        Transform: `init(params)`, `step(grads, state, params)`, `sharded(mesh, specs)`, `optax()`.

    Raises:
        TypeError: If an argument is of a wrong kind; the message names it and what it was.
        ValueError: If a number is out of range, or an option has no meaning in a compiled program.

    Numerics:
        The bits of `fusedstep.SGD` for the same numbers. Python's numbers are exact
        float64 constants, arrays are widened exactly. Denormals are kept, which XLA flushes.

    Example:
        >>> import jax, jax.numpy as jnp, fusedstep.jax as fj
        >>> tx = fj.sgd(lr=0.1)
        >>> params = {"w": jnp.ones(2)}
        >>> state = tx.init(params)
        >>> step = jax.jit(tx.step, donate_argnums=(1, 2))
        >>> params, state = step({"w": jnp.ones(2)}, state, params)
        >>> int(state.step), round(float(state.lr), 6)
        (1, 0.1)

    References:
        Robbins and Monro, 1951, *A stochastic approximation method*; `torch.optim.SGD`.
    """

def momentum(
    lr: LearningRate | Any = 0.001,
    *,
    momentum: MomentumFactor | Any = 0.9,
    next_momentum: NextMomentum | Any = None,
    dampening: Dampening | Any = 0.0,
    dampen_first_step: DampenFirstStep = False,
    lr_in_velocity: LrInVelocity = False,
    weight_decay: WeightDecay | Any = 0.0,
    decoupled_weight_decay: DecoupledWeightDecay = False,
    grad_clip_norm: GradClipNorm | Any = None,
    grad_clip_value: GradClipValue | Any = None,
    rescale_grad: RescaleGrad | Any = 1.0,
    maximize: Maximize = False,
    on_nonfinite: OnNonfinite = "propagate",
    grad_clip_scope: GradClipScope = "all",
    skip_grad_norm: SkipGradNorm | Any = None,
) -> Transform:
    r"""`Momentum` for JAX: a transform of pytrees.

    .. math::
        g_t &= \mathrm{clip}(g_t) + \lambda\, p_{t-1} \\
        v_t &= \mu\, v_{t-1} + g_t \\
        p_t &= p_{t-1} - \eta\, v_t

    Args:
        lr: Learning rate, >= 0. A number; an array of one; or a function of the number of steps
            applied so far (int32, traced), as optax's schedules are.
        momentum: Share of the velocity that a step keeps, in [0, 1), dimensionless. A number; an
            array of one; or a function of the number of steps applied so far, whose next value is
            the look-ahead of Nesterov's form.
        next_momentum: The momentum of the coming step, in [0, 1), which the look-ahead of
            Nesterov's form uses when the momentum changes from step to step. None: what the
            momentum's schedule or function says, else the same as `momentum`.
        dampening: In [0, 1]: the gradient enters the velocity with weight `1 - dampening`. Equal to
            `momentum` it makes the velocity an average of the gradients (unit gain).
        dampen_first_step: True applies `dampening` to an array's first step as well (CNTK); False
            takes `v = g` there, as PyTorch does.
        lr_in_velocity: False: `v = mu v + g; p -= lr ...` (PyTorch, braintools). True: `v = mu v -
            lr g; p += ...` (Keras, MXNet). They differ once `lr` changes.
        weight_decay: Decay coefficient, >= 0, added to the gradient after clipping (L2). Or a
            function `(path, array) -> float`, evaluated for each array when a program is compiled.
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
            ("propagate"), or leave everything as it was ("skip"), which the device decides.
        grad_clip_scope: Whose norm `grad_clip_norm` limits: of "all" gradients together, or of each
            "array". `state.grad_norm` is that of all gradients in any case.
        skip_grad_norm: A step whose gradients, all together and after `rescale_grad`, have a norm
            that is larger than this (or NaN) leaves everything as it was, > 0. None or inf: none is
            skipped for its norm.

        Every number may be an array of one element, whose value only the device knows; its range
        is not checked then.

    Returns:
        Transform: `init(params)`, `step(grads, state, params)`, `sharded(mesh, specs)`, `optax()`.

    Raises:
        TypeError: If an argument is of a wrong kind; the message names it and what it was.
        ValueError: If a number is out of range, or an option has no meaning in a compiled program.

    Numerics:
        The bits of `fusedstep.Momentum` for the same numbers. Python's numbers are exact
        float64 constants, arrays are widened exactly. Denormals are kept, which XLA flushes.

    Example:
        >>> import jax, jax.numpy as jnp, fusedstep.jax as fj
        >>> tx = fj.momentum(lr=0.1)
        >>> params = {"w": jnp.ones(2)}
        >>> state = tx.init(params)
        >>> step = jax.jit(tx.step, donate_argnums=(1, 2))
        >>> params, state = step({"w": jnp.ones(2)}, state, params)
        >>> int(state.step), round(float(state.lr), 6)
        (1, 0.1)

    References:
        Polyak, 1964, *Some methods of speeding up the convergence of iteration methods*.
    """

def nesterov(
    lr: LearningRate | Any = 0.001,
    *,
    momentum: MomentumFactor | Any = 0.9,
    next_momentum: NextMomentum | Any = None,
    dampening: Dampening | Any = 0.0,
    dampen_first_step: DampenFirstStep = False,
    lr_in_velocity: LrInVelocity = False,
    weight_decay: WeightDecay | Any = 0.0,
    decoupled_weight_decay: DecoupledWeightDecay = False,
    grad_clip_norm: GradClipNorm | Any = None,
    grad_clip_value: GradClipValue | Any = None,
    rescale_grad: RescaleGrad | Any = 1.0,
    maximize: Maximize = False,
    on_nonfinite: OnNonfinite = "propagate",
    grad_clip_scope: GradClipScope = "all",
    skip_grad_norm: SkipGradNorm | Any = None,
) -> Transform:
    r"""`MomentumNesterov` for JAX: a transform of pytrees.

    .. math::
        g_t &= \mathrm{clip}(g_t) + \lambda\, p_{t-1} \\
        v_t &= \mu\, v_{t-1} + g_t \\
        p_t &= p_{t-1} - \eta\, (g_t + \mu\, v_t)

    The arrays hold the look-ahead point, at which the gradient is taken. With a momentum that
    changes from step to step, the last :math:`\mu` is `next_momentum`.

    Args:
        lr: Learning rate, >= 0. A number; an array of one; or a function of the number of steps
            applied so far (int32, traced), as optax's schedules are.
        momentum: Share of the velocity that a step keeps, in [0, 1), dimensionless. A number; an
            array of one; or a function of the number of steps applied so far, whose next value is
            the look-ahead of Nesterov's form.
        next_momentum: The momentum of the coming step, in [0, 1), which the look-ahead of
            Nesterov's form uses when the momentum changes from step to step. None: what the
            momentum's schedule or function says, else the same as `momentum`.
        dampening: In [0, 1]: the gradient enters the velocity with weight `1 - dampening`. Equal to
            `momentum` it makes the velocity an average of the gradients (unit gain).
        dampen_first_step: True applies `dampening` to an array's first step as well (CNTK); False
            takes `v = g` there, as PyTorch does.
        lr_in_velocity: False: `v = mu v + g; p -= lr ...` (PyTorch, braintools). True: `v = mu v -
            lr g; p += ...` (Keras, MXNet). They differ once `lr` changes.
        weight_decay: Decay coefficient, >= 0, added to the gradient after clipping (L2). Or a
            function `(path, array) -> float`, evaluated for each array when a program is compiled.
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
            ("propagate"), or leave everything as it was ("skip"), which the device decides.
        grad_clip_scope: Whose norm `grad_clip_norm` limits: of "all" gradients together, or of each
            "array". `state.grad_norm` is that of all gradients in any case.
        skip_grad_norm: A step whose gradients, all together and after `rescale_grad`, have a norm
            that is larger than this (or NaN) leaves everything as it was, > 0. None or inf: none is
            skipped for its norm.

        Every number may be an array of one element, whose value only the device knows; its range
        is not checked then.

    Returns:
        Transform: `init(params)`, `step(grads, state, params)`, `sharded(mesh, specs)`, `optax()`.

    Raises:
        TypeError: If an argument is of a wrong kind; the message names it and what it was.
        ValueError: If a number is out of range, or an option has no meaning in a compiled program.

    Numerics:
        The bits of `fusedstep.MomentumNesterov` for the same numbers. Python's numbers are exact
        float64 constants, arrays are widened exactly. Denormals are kept, which XLA flushes.

    Example:
        >>> import jax, jax.numpy as jnp, fusedstep.jax as fj
        >>> tx = fj.nesterov(lr=0.1)
        >>> params = {"w": jnp.ones(2)}
        >>> state = tx.init(params)
        >>> step = jax.jit(tx.step, donate_argnums=(1, 2))
        >>> params, state = step({"w": jnp.ones(2)}, state, params)
        >>> int(state.step), round(float(state.lr), 6)
        (1, 0.1)

    References:
        Nesterov, 1983; Sutskever et al., 2013, *On the importance of initialization and momentum in
        deep learning*, eq. 3-4, in the form of `torch.optim.SGD`.
    """
