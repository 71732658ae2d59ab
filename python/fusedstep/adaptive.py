"""Adaptive optimizers: each class declares its hyper-parameters and its rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from fusedstep.base import Optimizer
from fusedstep.hyperparameters import (
    Alpha,
    Amsgrad,
    Betas,
    Centered,
    DecoupledWeightDecay,
    Eps,
    EpsInRoot,
    GradClipNorm,
    GradClipScope,
    GradClipValue,
    LearningRate,
    Maximize,
    MomentumDecay,
    MomentumFactor,
    Nesterov,
    NextMomentum,
    OnNonfinite,
    Params,
    RescaleGrad,
    SkipGradNorm,
    WeightDecay,
)

_BETAS = {"beta1": "betas[0]", "beta2": "betas[1]"}


@final
class NAdam(
    Optimizer,
    rules={"nadam": "True"},
    function="fused_nadam_step",
    derived=_BETAS,
):
    r"""Adam with Nesterov momentum (Dozat's NAdam with its momentum schedule), PyTorch form.

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
        params: A tree of arrays to update in place, or a list of param groups; None to register
            them later. Dense, writable; float32, float64, float16 or bfloat16.
        The hyper-parameters of the signature.

    State:
        exp_avg, exp_avg_sq: m and s; float32 (float64 for float64 parameters), made by the
            parameter's own library with its strides. step, mu_product: t and M, per array.

    Raises:
        TypeError: If an argument is of a wrong kind; the message names it and what it was.
        ValueError: If a hyper-parameter is out of range, or a param group has an unknown key.
        BufferError: If a parameter is read-only or overlaps another one.

    Numerics:
        Arithmetic in float32 (float64 for float64), each buffer rounded once per step; the same
        bits on every instruction set and for any number of threads. Scalars (bias corrections,
        powers, products) are computed in float64 and rounded once. The weights of an average add
        up to 1 exactly, whatever `betas` are rounded to. A float32 gradient beyond 1.8e19 overflows
        its square: the state becomes inf, and NaN at the next step, rather than freeze its element.
        Against PyTorch's float64 results: below 1e-9 (PyTorch keeps counts in float32).

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> weights = {"w": np.ones(2)}
        >>> optimizer = fs.NAdam(weights, lr=0.1)
        >>> for step in range(2):
        ...     result = optimizer.step({"w": np.array([1.0, -0.5])})
        >>> weights["w"].round(6)
        array([0.815986, 1.184014])

    Function:
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

    def __init__(
        self,
        params: Params = None,
        lr: LearningRate = 2e-3,
        betas: Betas = (0.9, 0.999),
        eps: Eps = 1e-8,
        weight_decay: WeightDecay = 0.0,
        momentum_decay: MomentumDecay = 4e-3,
        *,
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
class Adam(
    Optimizer,
    rules={"adam_amsgrad": "amsgrad", "adam": "True"},
    function="fused_adam_step",
    derived=_BETAS,
):
    r"""Adam, PyTorch form.

    .. math::
        g_t &= \mathrm{clip}(g_t) + \lambda\, p_{t-1} \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t, \qquad
        s_t = \beta_2 s_{t-1} + (1 - \beta_2)\, g_t^2 \\
        p_t &= p_{t-1} - \eta\,
        \frac{m_t / (1 - \beta_1^t)}{\sqrt{s_t / (1 - \beta_2^t)} + \epsilon}

    With `amsgrad=True`, :math:`\max(s_1, \dots, s_t)` stands for :math:`s_t` in the last line. With
    `decoupled_weight_decay=True` it is `AdamW`.

    Args:
        params: A tree of arrays to update in place, or a list of param groups; None to register
            them later. Dense, writable; float32, float64, float16 or bfloat16.
        The hyper-parameters of the signature.

    State:
        exp_avg, exp_avg_sq: m and s, and max_exp_avg_sq with `amsgrad`; float32 (float64 for
            float64 parameters), made by the parameter's own library with its strides. step: t, per
            array.

    Raises:
        TypeError: If an argument is of a wrong kind; the message names it and what it was.
        ValueError: If a hyper-parameter is out of range, or a param group has an unknown key.
        BufferError: If a parameter is read-only or overlaps another one.

    Numerics:
        Arithmetic in float32 (float64 for float64), each buffer rounded once per step; the same
        bits on every instruction set and for any number of threads. Scalars (bias corrections,
        powers, products) are computed in float64 and rounded once. The weights of an average add
        up to 1 exactly, whatever `betas` are rounded to. A float32 gradient beyond 1.8e19 overflows
        its square: the state becomes inf, and NaN at the next step, rather than freeze its element.
        Against PyTorch's float64 results: below 1e-9 (PyTorch keeps counts in float32).

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> weights = {"w": np.ones(2)}
        >>> optimizer = fs.Adam(weights, lr=0.1)
        >>> for step in range(2):
        ...     result = optimizer.step({"w": np.array([1.0, -0.5])})
        >>> weights["w"].round(6)
        array([0.8, 1.2])

    Function:
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

    def __init__(
        self,
        params: Params = None,
        lr: LearningRate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: Eps = 1e-8,
        weight_decay: WeightDecay = 0.0,
        amsgrad: Amsgrad = False,
        *,
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
class AdamW(
    Optimizer,
    rules={"adam_amsgrad": "amsgrad", "adam": "True"},
    function="fused_adamw_step",
    derived={**_BETAS, "decoupled_weight_decay": "True"},
):
    r"""Adam with decoupled weight decay, PyTorch form.

    .. math::
        g_t &= \mathrm{clip}(g_t) \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t, \qquad
        s_t = \beta_2 s_{t-1} + (1 - \beta_2)\, g_t^2 \\
        p_t &= p_{t-1} - \eta \lambda\, p_{t-1} - \eta\,
        \frac{m_t / (1 - \beta_1^t)}{\sqrt{s_t / (1 - \beta_2^t)} + \epsilon}

    With `amsgrad=True`, :math:`\max(s_1, \dots, s_t)` stands for :math:`s_t` in the last line.

    Args:
        params: A tree of arrays to update in place, or a list of param groups; None to register
            them later. Dense, writable; float32, float64, float16 or bfloat16.
        The hyper-parameters of the signature.

    State:
        exp_avg, exp_avg_sq: m and s, and max_exp_avg_sq with `amsgrad`; float32 (float64 for
            float64 parameters), made by the parameter's own library with its strides. step: t, per
            array.

    Raises:
        TypeError: If an argument is of a wrong kind; the message names it and what it was.
        ValueError: If a hyper-parameter is out of range, or a param group has an unknown key.
        BufferError: If a parameter is read-only or overlaps another one.

    Numerics:
        Arithmetic in float32 (float64 for float64), each buffer rounded once per step; the same
        bits on every instruction set and for any number of threads. Scalars (bias corrections,
        powers, products) are computed in float64 and rounded once. The weights of an average add
        up to 1 exactly, whatever `betas` are rounded to. A float32 gradient beyond 1.8e19 overflows
        its square: the state becomes inf, and NaN at the next step, rather than freeze its element.
        Against PyTorch's float64 results: below 1e-9 (PyTorch keeps counts in float32).

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> weights = {"w": np.ones(2), "bias": np.ones(1)}
        >>> optimizer = fs.AdamW(
        ...     weights, lr=0.1, weight_decay=lambda path, array: 0.0 if path == "bias" else 0.5
        ... )
        >>> result = optimizer.step({"w": np.array([1.0, -0.5]), "bias": np.array([2.0])})
        >>> weights["w"].round(6), weights["bias"].round(6)
        (array([0.85, 1.05]), array([0.9]))

    Function:
        >>> import numpy as np, fusedstep as fs
        >>> p, g = np.ones(2), np.array([1.0, -0.5])
        >>> result = fs.fused_adamw_step(p, g, lr=0.1, weight_decay=0.5)
        >>> p.round(6)
        array([0.85, 1.05])

    References:
        Loshchilov and Hutter, 2019, *Decoupled weight decay regularization*, algorithm 2 with the
        learning rate in the decay; `torch.optim.AdamW`.
    """

    def __init__(
        self,
        params: Params = None,
        lr: LearningRate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: Eps = 1e-8,
        weight_decay: WeightDecay = 1e-2,
        amsgrad: Amsgrad = False,
        *,
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
class RMSprop(
    Optimizer,
    rules={
        "rmsprop": "momentum == 0 and not varies and not centered",
        "rmsprop_centered": "momentum == 0 and not varies",
        "rmsprop_momentum": "not centered",
        "rmsprop_centered_momentum": "True",
    },
    function="fused_rmsprop_step",
    derived={},
):
    r"""RMSprop, PyTorch form, with momentum of either kind.

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
        params: A tree of arrays to update in place, or a list of param groups; None to register
            them later. Dense, writable; float32, float64, float16 or bfloat16.
        The hyper-parameters of the signature.

    State:
        square_avg: s, and grad_avg: a with `centered`, momentum_buffer: v with momentum; float32
            (float64 for float64 parameters), made by the parameter's own library with its strides.
            (TensorFlow 1 starts s from ones: pass such a buffer, or `set_state`.)

    Raises:
        TypeError: If an argument is of a wrong kind; the message names it and what it was.
        ValueError: If a hyper-parameter is out of range, `nesterov` comes without momentum, or a
            param group has an unknown key.
        BufferError: If a parameter is read-only or overlaps another one.

    Numerics:
        Arithmetic in float32 (float64 for float64), each buffer rounded once per step; the same
        bits on every instruction set and for any number of threads. Scalars (bias corrections,
        powers, products) are computed in float64 and rounded once. The weights of an average add
        up to 1 exactly, whatever `betas` are rounded to. A float32 gradient beyond 1.8e19 overflows
        its square: the state becomes inf, and NaN at the next step, rather than freeze its element.
        Against PyTorch's float64 results: below 1e-9 (PyTorch keeps counts in float32).

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> weights = {"w": np.ones(2)}
        >>> optimizer = fs.RMSprop(weights, lr=0.1, alpha=0.75, momentum=0.5, nesterov=True)
        >>> result = optimizer.step({"w": np.array([1.0, -0.5])})
        >>> weights["w"].round(6)
        array([0.7, 1.3])

    Function:
        >>> import numpy as np, fusedstep as fs
        >>> p, g = np.ones(2), np.array([1.0, -0.5])
        >>> result = fs.fused_rmsprop_step(p, g, lr=0.1, alpha=0.75)
        >>> p.round(6), result.state["square_avg"]
        (array([0.8, 1.2]), array([0.25  , 0.0625]))

    References:
        Hinton, 2012, lecture 6e; Graves, 2013, *Generating sequences with recurrent neural
        networks*, eq. 38-45 (centered); `torch.optim.RMSprop`.
    """

    def __init__(
        self,
        params: Params = None,
        lr: LearningRate = 1e-2,
        alpha: Alpha = 0.99,
        eps: Eps = 1e-8,
        weight_decay: WeightDecay = 0.0,
        momentum: MomentumFactor = 0.0,
        centered: Centered = False,
        *,
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
    ) -> None:
        self._set_up(locals())

    @staticmethod
    def _check_form(group: Mapping[str, Any]) -> None:
        momentum = group["momentum"]
        if group["nesterov"] and isinstance(momentum, (int, float)) and momentum == 0:
            raise ValueError(f"nesterov: needs momentum > 0, got momentum = {momentum}")
