"""Signatures of the classes; written by `python -m fusedstep.torch.stubs`."""

from typing import final

from torch import Tensor
from torch.optim.optimizer import ParamsT

from fusedstep.hyperparameters import (
    Alpha,
    Amsgrad,
    Centered,
    DampenFirstStep,
    Dampening,
    DecoupledWeightDecay,
    Eps,
    EpsInRoot,
    GradClipNorm,
    GradClipScope,
    GradClipValue,
    LrInVelocity,
    Maximize,
    MomentumDecay,
    Nesterov,
    OnNonfinite,
    SkipGradNorm,
)
from fusedstep.torch.base import Optimizer

@final
class SGD(Optimizer):
    r"""Drop-in for `torch.optim.SGD`, bit for bit (float32 and float64, for-loop and foreach).

    With `momentum` > 0 it is `Momentum`, and with `nesterov=True`, too, `MomentumNesterov`. Without
    momentum it keeps no buffer and moves 12 bytes per float32 element:

    .. math::
        g_t &= \mathrm{clip}(g_t) + \lambda\, p_{t-1} \\
        p_t &= p_{t-1} - \eta\, g_t

    Args:
        params: Parameters, pairs of name and parameter, or dicts of param groups, as for
            `torch.optim.Optimizer`. float32, float64, float16, bfloat16, complex64 or complex128.
            One that occurs twice is updated once.
        lr: Learning rate, >= 0. A number, or a tensor of one, which is read at every step; on the
            GPU of the parameters by that GPU, so that nobody waits, and nobody checks its range.
        momentum: Share of the velocity that a step keeps, in [0, 1), dimensionless. A number, or a
            tensor of one, which is read at every step.
        dampening: In [0, 1]: the gradient enters the velocity with weight `1 - dampening`. Equal to
            `momentum` it makes the velocity an average of the gradients (unit gain).
        weight_decay: Decay coefficient, >= 0, added to the gradient after clipping (L2).
        nesterov: True steps along `g + mu v` instead of along `v`.
        maximize: True ascends instead of descending.
        foreach: Accepted, without effect: there is one implementation.
        differentiable: Must be False: autograd cannot see into the step.
        fused: Accepted, without effect: the step is always fused.
        decoupled_weight_decay: True decays the parameter itself, `p -= lr wd p`, not through the
            gradient.
        grad_clip_norm: Largest norm of all gradients of the step together (see `grad_clip_scope`),
            > 0: they are scaled by `min(1, grad_clip_norm / norm)`. `inf` measures the norm without
            clipping. None: neither.
        grad_clip_value: Largest magnitude of a gradient element, > 0, applied after the norm clip.
            None: no limit.
        rescale_grad: Multiplies every gradient before anything else is done with it, finite. A
            number, or a tensor of one, which is read as that of `lr` is.
        on_nonfinite: What a step does whose gradients hold inf or NaN: compute with them
            ("propagate"), leave everything as it was ("skip"), or do so and raise
            FloatingPointError ("raise").
        grad_clip_scope: Whose norm `grad_clip_norm` limits: of "all" gradients together, of each
            param "group", or of each "array". The result's `grad_norm` is that of all gradients in
            any case.
        skip_grad_norm: A step whose gradients, all together and after `rescale_grad`, have a norm
            that is larger than this (or NaN) leaves everything as it was, > 0. None or inf: none is
            skipped for its norm.
        master_weights: True keeps a float32 master of each float16 or bfloat16 parameter
            (`master_param` in its state). The step updates the master and writes it to the
            parameter, rounded once, in the same pass. What others write into the parameter goes
            into the master, too; only not through `.data`, which autograd cannot see.
        norm_in_backward: True measures each gradient in the backward pass, as soon as it is
            complete and while it is in cache, so that the step need not read it for the norm. The
            clip stays exact. Gradients may change afterwards, but not through `.grad.data`, which
            autograd cannot see.
        fused_unscale: Whether `GradScaler` leaves it to the step to unscale the gradients, which
            saves a pass. None: if a group clips. Set it to False where something else must see
            unscaled gradients before the step.

    State:
        - `momentum_buffer`: The velocity v, where the form keeps it.
        - `master_param`: The float32 master of a 16-bit parameter, with `master_weights`.

        Tensors have the strides, the sharding and the device of their parameter, and its dtype, but
        float32 for a float16 or bfloat16 one. Counts are brought up to date when `state` or
        `state_dict` is read.

    Raises:
        TypeError: If an argument is of a wrong kind; the message names it and what it was.
        ValueError: If a hyper-parameter is out of range or does not go with another one, or
            `differentiable` is True; from torch, if `params` is empty.

    Numerics:
        Arithmetic in float32 (float64 for float64), each buffer rounded once per step; the same
        bits on every instruction set and for any number of threads. In PyTorch's form they are
        those of `torch.optim.SGD` (for-loop and foreach).

    Example:
        >>> import torch
        >>> from fusedstep import torch as optim
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = optim.SGD([weight], lr=0.5, momentum=0.9, grad_clip_norm=1.0)
        >>> (weight * torch.tensor([3.0, 4.0])).sum().backward()
        >>> optimizer.step()
        >>> optimizer.grad_norm, weight.detach()
        (tensor(5., dtype=torch.float64), tensor([0.7000, 0.6000]))

    References:
        Robbins and Monro, 1951, *A stochastic approximation method*; `torch.optim.SGD`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        momentum: float | Tensor = 0.0,
        dampening: Dampening = 0.0,
        weight_decay: float | Tensor = 0.0,
        nesterov: Nesterov = False,
        *,
        maximize: Maximize = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: DecoupledWeightDecay = False,
        grad_clip_norm: GradClipNorm = None,
        grad_clip_value: GradClipValue = None,
        rescale_grad: float | Tensor = 1.0,
        on_nonfinite: OnNonfinite = "propagate",
        grad_clip_scope: GradClipScope = "all",
        skip_grad_norm: SkipGradNorm = None,
        master_weights: bool = False,
        norm_in_backward: bool = False,
        fused_unscale: bool | None = None,
    ) -> None: ...

@final
class Momentum(Optimizer):
    r"""`torch.optim.SGD` with momentum, and the conventions of other libraries; its checkpoints.

    .. math::
        g_t &= \mathrm{clip}(g_t) + \lambda\, p_{t-1} \\
        v_t &= \mu\, v_{t-1} + g_t \\
        p_t &= p_{t-1} - \eta\, v_t

    Args:
        params: Parameters, pairs of name and parameter, or dicts of param groups, as for
            `torch.optim.Optimizer`. float32, float64, float16, bfloat16, complex64 or complex128.
            One that occurs twice is updated once.
        lr: Learning rate, >= 0. A number, or a tensor of one, which is read at every step; on the
            GPU of the parameters by that GPU, so that nobody waits, and nobody checks its range.
        momentum: Share of the velocity that a step keeps, in [0, 1), dimensionless. A number, or a
            tensor of one, which is read at every step.
        maximize: True ascends instead of descending.
        foreach: Accepted, without effect: there is one implementation.
        differentiable: Must be False: autograd cannot see into the step.
        fused: Accepted, without effect: the step is always fused.
        next_momentum: The momentum of the coming step, in [0, 1), which the look-ahead of
            Nesterov's form uses when the momentum changes from step to step. None: the same as
            `momentum`, as in torch.
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
            number, or a tensor of one, which is read as that of `lr` is.
        on_nonfinite: What a step does whose gradients hold inf or NaN: compute with them
            ("propagate"), leave everything as it was ("skip"), or do so and raise
            FloatingPointError ("raise").
        grad_clip_scope: Whose norm `grad_clip_norm` limits: of "all" gradients together, of each
            param "group", or of each "array". The result's `grad_norm` is that of all gradients in
            any case.
        skip_grad_norm: A step whose gradients, all together and after `rescale_grad`, have a norm
            that is larger than this (or NaN) leaves everything as it was, > 0. None or inf: none is
            skipped for its norm.
        master_weights: True keeps a float32 master of each float16 or bfloat16 parameter
            (`master_param` in its state). The step updates the master and writes it to the
            parameter, rounded once, in the same pass. What others write into the parameter goes
            into the master, too; only not through `.data`, which autograd cannot see.
        norm_in_backward: True measures each gradient in the backward pass, as soon as it is
            complete and while it is in cache, so that the step need not read it for the norm. The
            clip stays exact. Gradients may change afterwards, but not through `.grad.data`, which
            autograd cannot see.
        fused_unscale: Whether `GradScaler` leaves it to the step to unscale the gradients, which
            saves a pass. None: if a group clips. Set it to False where something else must see
            unscaled gradients before the step.

    State:
        - `momentum_buffer`: The velocity v.
        - `master_param`: The float32 master of a 16-bit parameter, with `master_weights`.

        Tensors have the strides, the sharding and the device of their parameter, and its dtype, but
        float32 for a float16 or bfloat16 one. Counts are brought up to date when `state` or
        `state_dict` is read.

    Raises:
        TypeError: If an argument is of a wrong kind; the message names it and what it was.
        ValueError: If a hyper-parameter is out of range or does not go with another one, or
            `differentiable` is True; from torch, if `params` is empty.

    Numerics:
        Arithmetic in float32 (float64 for float64), each buffer rounded once per step; the same
        bits on every instruction set and for any number of threads. In PyTorch's form they are
        those of `torch.optim.SGD` (for-loop and foreach).

    Example:
        >>> import torch
        >>> from fusedstep import torch as optim
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = optim.Momentum([weight], lr=0.5, lr_in_velocity=True)
        >>> (weight * torch.tensor([3.0, 4.0])).sum().backward()
        >>> optimizer.step()
        >>> weight.detach(), optimizer.state[weight]
        (tensor([-0.5000, -1.0000]), {'momentum_buffer': tensor([-1.5000, -2.0000])})

    References:
        Polyak, 1964, *Some methods of speeding up the convergence of iteration methods*.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        momentum: float | Tensor = 0.9,
        *,
        maximize: Maximize = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        next_momentum: float | None = None,
        dampening: Dampening = 0.0,
        dampen_first_step: DampenFirstStep = False,
        lr_in_velocity: LrInVelocity = False,
        weight_decay: float | Tensor = 0.0,
        decoupled_weight_decay: DecoupledWeightDecay = False,
        grad_clip_norm: GradClipNorm = None,
        grad_clip_value: GradClipValue = None,
        rescale_grad: float | Tensor = 1.0,
        on_nonfinite: OnNonfinite = "propagate",
        grad_clip_scope: GradClipScope = "all",
        skip_grad_norm: SkipGradNorm = None,
        master_weights: bool = False,
        norm_in_backward: bool = False,
        fused_unscale: bool | None = None,
    ) -> None: ...

@final
class MomentumNesterov(Optimizer):
    r"""`torch.optim.SGD` with `nesterov=True`, the conventions of other libraries; its checkpoints.

    .. math::
        g_t &= \mathrm{clip}(g_t) + \lambda\, p_{t-1} \\
        v_t &= \mu\, v_{t-1} + g_t \\
        p_t &= p_{t-1} - \eta\, (g_t + \mu\, v_t)

    The arrays hold the look-ahead point, at which the gradient is taken. With a momentum that
    changes from step to step, the last :math:`\mu` is `next_momentum`.

    Args:
        params: Parameters, pairs of name and parameter, or dicts of param groups, as for
            `torch.optim.Optimizer`. float32, float64, float16, bfloat16, complex64 or complex128.
            One that occurs twice is updated once.
        lr: Learning rate, >= 0. A number, or a tensor of one, which is read at every step; on the
            GPU of the parameters by that GPU, so that nobody waits, and nobody checks its range.
        momentum: Share of the velocity that a step keeps, in [0, 1), dimensionless. A number, or a
            tensor of one, which is read at every step.
        maximize: True ascends instead of descending.
        foreach: Accepted, without effect: there is one implementation.
        differentiable: Must be False: autograd cannot see into the step.
        fused: Accepted, without effect: the step is always fused.
        next_momentum: The momentum of the coming step, in [0, 1), which the look-ahead of
            Nesterov's form uses when the momentum changes from step to step. None: the same as
            `momentum`, as in torch.
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
            number, or a tensor of one, which is read as that of `lr` is.
        on_nonfinite: What a step does whose gradients hold inf or NaN: compute with them
            ("propagate"), leave everything as it was ("skip"), or do so and raise
            FloatingPointError ("raise").
        grad_clip_scope: Whose norm `grad_clip_norm` limits: of "all" gradients together, of each
            param "group", or of each "array". The result's `grad_norm` is that of all gradients in
            any case.
        skip_grad_norm: A step whose gradients, all together and after `rescale_grad`, have a norm
            that is larger than this (or NaN) leaves everything as it was, > 0. None or inf: none is
            skipped for its norm.
        master_weights: True keeps a float32 master of each float16 or bfloat16 parameter
            (`master_param` in its state). The step updates the master and writes it to the
            parameter, rounded once, in the same pass. What others write into the parameter goes
            into the master, too; only not through `.data`, which autograd cannot see.
        norm_in_backward: True measures each gradient in the backward pass, as soon as it is
            complete and while it is in cache, so that the step need not read it for the norm. The
            clip stays exact. Gradients may change afterwards, but not through `.grad.data`, which
            autograd cannot see.
        fused_unscale: Whether `GradScaler` leaves it to the step to unscale the gradients, which
            saves a pass. None: if a group clips. Set it to False where something else must see
            unscaled gradients before the step.

    State:
        - `momentum_buffer`: The velocity v.
        - `master_param`: The float32 master of a 16-bit parameter, with `master_weights`.

        Tensors have the strides, the sharding and the device of their parameter, and its dtype, but
        float32 for a float16 or bfloat16 one. Counts are brought up to date when `state` or
        `state_dict` is read.

    Raises:
        TypeError: If an argument is of a wrong kind; the message names it and what it was.
        ValueError: If a hyper-parameter is out of range or does not go with another one, or
            `differentiable` is True; from torch, if `params` is empty.

    Numerics:
        Arithmetic in float32 (float64 for float64), each buffer rounded once per step; the same
        bits on every instruction set and for any number of threads. In PyTorch's form they are
        those of `torch.optim.SGD` (for-loop and foreach).

    Example:
        >>> import torch
        >>> from fusedstep import torch as optim
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = optim.MomentumNesterov([weight], lr=0.5, momentum=0.5, grad_clip_norm=2.5)
        >>> (weight * torch.tensor([3.0, 4.0])).sum().backward()
        >>> optimizer.step()
        >>> optimizer.grad_norm, weight.detach()
        (tensor(5., dtype=torch.float64), tensor([-0.1250, -0.5000]))

    References:
        Nesterov, 1983; Sutskever et al., 2013, *On the importance of initialization and momentum in
        deep learning*, eq. 3-4, in the form of `torch.optim.SGD`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        momentum: float | Tensor = 0.9,
        *,
        maximize: Maximize = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        next_momentum: float | None = None,
        dampening: Dampening = 0.0,
        dampen_first_step: DampenFirstStep = False,
        lr_in_velocity: LrInVelocity = False,
        weight_decay: float | Tensor = 0.0,
        decoupled_weight_decay: DecoupledWeightDecay = False,
        grad_clip_norm: GradClipNorm = None,
        grad_clip_value: GradClipValue = None,
        rescale_grad: float | Tensor = 1.0,
        on_nonfinite: OnNonfinite = "propagate",
        grad_clip_scope: GradClipScope = "all",
        skip_grad_norm: SkipGradNorm = None,
        master_weights: bool = False,
        norm_in_backward: bool = False,
        fused_unscale: bool | None = None,
    ) -> None: ...

@final
class NAdam(Optimizer):
    r"""Drop-in for `torch.optim.NAdam`, which has no fused form.

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
        params: Parameters, pairs of name and parameter, or dicts of param groups, as for
            `torch.optim.Optimizer`. float32, float64, float16, bfloat16, complex64 or complex128.
            One that occurs twice is updated once.
        lr: Learning rate, >= 0. A number, or a tensor of one, which is read at every step; on the
            GPU of the parameters by that GPU, so that nobody waits, and nobody checks its range.
        betas: Decay rates of the averages of the gradient and of its square, each in [0, 1).
        eps: Added to the square root in the denominator, >= 0; bounds the step.
        weight_decay: Decay coefficient, >= 0, added to the gradient after clipping (L2).
        momentum_decay: How quickly the momentum of NAdam warms up to `betas[0]` from half of it, >=
            0: `mu_t = betas[0] (1 - 0.96**(t momentum_decay) / 2)`. Dozat's report has 0.004, Keras
            3 1.
        decoupled_weight_decay: True decays the parameter itself, `p -= lr wd p`, not through the
            gradient.
        maximize: True ascends instead of descending.
        foreach: Accepted, without effect: there is one implementation.
        capturable: Accepted, without effect: a step on a GPU can always be captured.
        differentiable: Must be False: autograd cannot see into the step.
        grad_clip_norm: Largest norm of all gradients of the step together (see `grad_clip_scope`),
            > 0: they are scaled by `min(1, grad_clip_norm / norm)`. `inf` measures the norm without
            clipping. None: neither.
        grad_clip_value: Largest magnitude of a gradient element, > 0, applied after the norm clip.
            None: no limit.
        rescale_grad: Multiplies every gradient before anything else is done with it, finite. A
            number, or a tensor of one, which is read as that of `lr` is.
        on_nonfinite: What a step does whose gradients hold inf or NaN: compute with them
            ("propagate"), leave everything as it was ("skip"), or do so and raise
            FloatingPointError ("raise").
        grad_clip_scope: Whose norm `grad_clip_norm` limits: of "all" gradients together, of each
            param "group", or of each "array". The result's `grad_norm` is that of all gradients in
            any case.
        skip_grad_norm: A step whose gradients, all together and after `rescale_grad`, have a norm
            that is larger than this (or NaN) leaves everything as it was, > 0. None or inf: none is
            skipped for its norm.
        master_weights: True keeps a float32 master of each float16 or bfloat16 parameter
            (`master_param` in its state). The step updates the master and writes it to the
            parameter, rounded once, in the same pass. What others write into the parameter goes
            into the master, too; only not through `.data`, which autograd cannot see.
        norm_in_backward: True measures each gradient in the backward pass, as soon as it is
            complete and while it is in cache, so that the step need not read it for the norm. The
            clip stays exact. Gradients may change afterwards, but not through `.grad.data`, which
            autograd cannot see.
        fused_unscale: Whether `GradScaler` leaves it to the step to unscale the gradients, which
            saves a pass. None: if a group clips. Set it to False where something else must see
            unscaled gradients before the step.

    State:
        - `exp_avg`: The average m of the gradient.
        - `exp_avg_sq`: The average s of the gradient's square.
        - `step`: The number t of steps that were applied to the parameter, a tensor on the CPU.
        - `mu_product`: The product M of the momenta so far, a float64 tensor on the CPU.
        - `master_param`: The float32 master of a 16-bit parameter, with `master_weights`.

        Tensors have the strides, the sharding and the device of their parameter, and its dtype, but
        float32 for a float16 or bfloat16 one. Counts are brought up to date when `state` or
        `state_dict` is read.

    Raises:
        TypeError: If an argument is of a wrong kind; the message names it and what it was.
        ValueError: If a hyper-parameter is out of range or does not go with another one, or
            `differentiable` is True; from torch, if `params` is empty.

    Numerics:
        Arithmetic in float32 (float64 for float64), each buffer rounded once per step; the same
        bits on every instruction set and for any number of threads. Scalars (bias corrections,
        powers, products) are computed in float64 and rounded once. The weights of an average add
        up to 1 exactly, whatever `betas` are rounded to. A float32 gradient beyond 1.8e19 overflows
        its square: the state becomes inf, and NaN at the next step, rather than freeze its element.
        Against PyTorch's float64 results: below 1e-9 (PyTorch keeps counts in float32).

    Example:
        >>> import torch
        >>> from fusedstep import torch as optim
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = optim.NAdam([weight], lr=0.1)
        >>> (weight * torch.tensor([3.0, 4.0])).sum().backward()
        >>> optimizer.step()
        >>> weight.detach(), optimizer.state[weight]["mu_product"]
        (tensor([0.8944, 0.8944]), tensor(0.4501, dtype=torch.float64))

    References:
        Dozat, 2016, *Incorporating Nesterov momentum into Adam*, algorithm 2; `torch.optim.NAdam`.
        Keras 3 has `momentum_decay` = 1, MXNet one product for all arrays.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.002,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: Eps = 1e-08,
        weight_decay: float | Tensor = 0.0,
        momentum_decay: MomentumDecay = 0.004,
        decoupled_weight_decay: DecoupledWeightDecay = False,
        *,
        maximize: Maximize = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        grad_clip_norm: GradClipNorm = None,
        grad_clip_value: GradClipValue = None,
        rescale_grad: float | Tensor = 1.0,
        on_nonfinite: OnNonfinite = "propagate",
        grad_clip_scope: GradClipScope = "all",
        skip_grad_norm: SkipGradNorm = None,
        master_weights: bool = False,
        norm_in_backward: bool = False,
        fused_unscale: bool | None = None,
    ) -> None: ...

@final
class Adam(Optimizer):
    r"""Drop-in for `torch.optim.Adam`.

    .. math::
        g_t &= \mathrm{clip}(g_t) + \lambda\, p_{t-1} \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t, \qquad
        s_t = \beta_2 s_{t-1} + (1 - \beta_2)\, g_t^2 \\
        p_t &= p_{t-1} - \eta\,
        \frac{m_t / (1 - \beta_1^t)}{\sqrt{s_t / (1 - \beta_2^t)} + \epsilon}

    With `amsgrad=True`, :math:`\max(s_1, \dots, s_t)` stands for :math:`s_t` in the last line. With
    `decoupled_weight_decay=True` it is `AdamW`.

    Args:
        params: Parameters, pairs of name and parameter, or dicts of param groups, as for
            `torch.optim.Optimizer`. float32, float64, float16, bfloat16, complex64 or complex128.
            One that occurs twice is updated once.
        lr: Learning rate, >= 0. A number, or a tensor of one, which is read at every step; on the
            GPU of the parameters by that GPU, so that nobody waits, and nobody checks its range.
        betas: Decay rates of the averages of the gradient and of its square, each in [0, 1).
        eps: Added to the square root in the denominator, >= 0; bounds the step.
        weight_decay: Decay coefficient, >= 0, added to the gradient after clipping (L2).
        amsgrad: True divides by the largest average of squares so far, which is kept as state.
        maximize: True ascends instead of descending.
        foreach: Accepted, without effect: there is one implementation.
        capturable: Accepted, without effect: a step on a GPU can always be captured.
        differentiable: Must be False: autograd cannot see into the step.
        fused: Accepted, without effect: the step is always fused.
        decoupled_weight_decay: True decays the parameter itself, `p -= lr wd p`, not through the
            gradient.
        grad_clip_norm: Largest norm of all gradients of the step together (see `grad_clip_scope`),
            > 0: they are scaled by `min(1, grad_clip_norm / norm)`. `inf` measures the norm without
            clipping. None: neither.
        grad_clip_value: Largest magnitude of a gradient element, > 0, applied after the norm clip.
            None: no limit.
        rescale_grad: Multiplies every gradient before anything else is done with it, finite. A
            number, or a tensor of one, which is read as that of `lr` is.
        on_nonfinite: What a step does whose gradients hold inf or NaN: compute with them
            ("propagate"), leave everything as it was ("skip"), or do so and raise
            FloatingPointError ("raise").
        grad_clip_scope: Whose norm `grad_clip_norm` limits: of "all" gradients together, of each
            param "group", or of each "array". The result's `grad_norm` is that of all gradients in
            any case.
        skip_grad_norm: A step whose gradients, all together and after `rescale_grad`, have a norm
            that is larger than this (or NaN) leaves everything as it was, > 0. None or inf: none is
            skipped for its norm.
        master_weights: True keeps a float32 master of each float16 or bfloat16 parameter
            (`master_param` in its state). The step updates the master and writes it to the
            parameter, rounded once, in the same pass. What others write into the parameter goes
            into the master, too; only not through `.data`, which autograd cannot see.
        norm_in_backward: True measures each gradient in the backward pass, as soon as it is
            complete and while it is in cache, so that the step need not read it for the norm. The
            clip stays exact. Gradients may change afterwards, but not through `.grad.data`, which
            autograd cannot see.
        fused_unscale: Whether `GradScaler` leaves it to the step to unscale the gradients, which
            saves a pass. None: if a group clips. Set it to False where something else must see
            unscaled gradients before the step.

    State:
        - `exp_avg`: The average m of the gradient.
        - `exp_avg_sq`: The average s of the gradient's square.
        - `max_exp_avg_sq`: The largest s so far, where the form keeps it.
        - `step`: The number t of steps that were applied to the parameter, a tensor on the CPU.
        - `master_param`: The float32 master of a 16-bit parameter, with `master_weights`.

        Tensors have the strides, the sharding and the device of their parameter, and its dtype, but
        float32 for a float16 or bfloat16 one. Counts are brought up to date when `state` or
        `state_dict` is read.

    Raises:
        TypeError: If an argument is of a wrong kind; the message names it and what it was.
        ValueError: If a hyper-parameter is out of range or does not go with another one, or
            `differentiable` is True; from torch, if `params` is empty.

    Numerics:
        Arithmetic in float32 (float64 for float64), each buffer rounded once per step; the same
        bits on every instruction set and for any number of threads. Scalars (bias corrections,
        powers, products) are computed in float64 and rounded once. The weights of an average add
        up to 1 exactly, whatever `betas` are rounded to. A float32 gradient beyond 1.8e19 overflows
        its square: the state becomes inf, and NaN at the next step, rather than freeze its element.
        Against PyTorch's float64 results: below 1e-9 (PyTorch keeps counts in float32).

    Example:
        >>> import torch
        >>> from fusedstep import torch as optim
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = optim.Adam([weight], lr=0.1, grad_clip_value=0.5)
        >>> (weight * torch.tensor([3.0, 4.0])).sum().backward()
        >>> optimizer.step()
        >>> weight.detach(), sorted(optimizer.state[weight])
        (tensor([0.9000, 0.9000]), ['exp_avg', 'exp_avg_sq', 'step'])

    References:
        Kingma and Ba, 2015, *Adam: a method for stochastic optimization*; Reddi, Kale and Kumar,
        2018, *On the convergence of Adam and beyond* (amsgrad); `torch.optim.Adam`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: Eps = 1e-08,
        weight_decay: float | Tensor = 0.0,
        amsgrad: Amsgrad = False,
        *,
        maximize: Maximize = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: DecoupledWeightDecay = False,
        grad_clip_norm: GradClipNorm = None,
        grad_clip_value: GradClipValue = None,
        rescale_grad: float | Tensor = 1.0,
        on_nonfinite: OnNonfinite = "propagate",
        grad_clip_scope: GradClipScope = "all",
        skip_grad_norm: SkipGradNorm = None,
        master_weights: bool = False,
        norm_in_backward: bool = False,
        fused_unscale: bool | None = None,
    ) -> None: ...

@final
class AdamW(Optimizer):
    r"""Drop-in for `torch.optim.AdamW`.

    .. math::
        g_t &= \mathrm{clip}(g_t) \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t, \qquad
        s_t = \beta_2 s_{t-1} + (1 - \beta_2)\, g_t^2 \\
        p_t &= p_{t-1} - \eta \lambda\, p_{t-1} - \eta\,
        \frac{m_t / (1 - \beta_1^t)}{\sqrt{s_t / (1 - \beta_2^t)} + \epsilon}

    With `amsgrad=True`, :math:`\max(s_1, \dots, s_t)` stands for :math:`s_t` in the last line.

    Args:
        params: Parameters, pairs of name and parameter, or dicts of param groups, as for
            `torch.optim.Optimizer`. float32, float64, float16, bfloat16, complex64 or complex128.
            One that occurs twice is updated once.
        lr: Learning rate, >= 0. A number, or a tensor of one, which is read at every step; on the
            GPU of the parameters by that GPU, so that nobody waits, and nobody checks its range.
        betas: Decay rates of the averages of the gradient and of its square, each in [0, 1).
        eps: Added to the square root in the denominator, >= 0; bounds the step.
        weight_decay: Decay coefficient, >= 0: a step subtracts `lr * weight_decay` of the
            parameter.
        amsgrad: True divides by the largest average of squares so far, which is kept as state.
        maximize: True ascends instead of descending.
        foreach: Accepted, without effect: there is one implementation.
        capturable: Accepted, without effect: a step on a GPU can always be captured.
        differentiable: Must be False: autograd cannot see into the step.
        fused: Accepted, without effect: the step is always fused.
        grad_clip_norm: Largest norm of all gradients of the step together (see `grad_clip_scope`),
            > 0: they are scaled by `min(1, grad_clip_norm / norm)`. `inf` measures the norm without
            clipping. None: neither.
        grad_clip_value: Largest magnitude of a gradient element, > 0, applied after the norm clip.
            None: no limit.
        rescale_grad: Multiplies every gradient before anything else is done with it, finite. A
            number, or a tensor of one, which is read as that of `lr` is.
        on_nonfinite: What a step does whose gradients hold inf or NaN: compute with them
            ("propagate"), leave everything as it was ("skip"), or do so and raise
            FloatingPointError ("raise").
        grad_clip_scope: Whose norm `grad_clip_norm` limits: of "all" gradients together, of each
            param "group", or of each "array". The result's `grad_norm` is that of all gradients in
            any case.
        skip_grad_norm: A step whose gradients, all together and after `rescale_grad`, have a norm
            that is larger than this (or NaN) leaves everything as it was, > 0. None or inf: none is
            skipped for its norm.
        master_weights: True keeps a float32 master of each float16 or bfloat16 parameter
            (`master_param` in its state). The step updates the master and writes it to the
            parameter, rounded once, in the same pass. What others write into the parameter goes
            into the master, too; only not through `.data`, which autograd cannot see.
        norm_in_backward: True measures each gradient in the backward pass, as soon as it is
            complete and while it is in cache, so that the step need not read it for the norm. The
            clip stays exact. Gradients may change afterwards, but not through `.grad.data`, which
            autograd cannot see.
        fused_unscale: Whether `GradScaler` leaves it to the step to unscale the gradients, which
            saves a pass. None: if a group clips. Set it to False where something else must see
            unscaled gradients before the step.

    State:
        - `exp_avg`: The average m of the gradient.
        - `exp_avg_sq`: The average s of the gradient's square.
        - `max_exp_avg_sq`: The largest s so far, where the form keeps it.
        - `step`: The number t of steps that were applied to the parameter, a tensor on the CPU.
        - `master_param`: The float32 master of a 16-bit parameter, with `master_weights`.

        Tensors have the strides, the sharding and the device of their parameter, and its dtype, but
        float32 for a float16 or bfloat16 one. Counts are brought up to date when `state` or
        `state_dict` is read.

    Raises:
        TypeError: If an argument is of a wrong kind; the message names it and what it was.
        ValueError: If a hyper-parameter is out of range or does not go with another one, or
            `differentiable` is True; from torch, if `params` is empty.

    Numerics:
        Arithmetic in float32 (float64 for float64), each buffer rounded once per step; the same
        bits on every instruction set and for any number of threads. Scalars (bias corrections,
        powers, products) are computed in float64 and rounded once. The weights of an average add
        up to 1 exactly, whatever `betas` are rounded to. A float32 gradient beyond 1.8e19 overflows
        its square: the state becomes inf, and NaN at the next step, rather than freeze its element.
        Against PyTorch's float64 results: below 1e-9 (PyTorch keeps counts in float32).

    Example:
        >>> import torch
        >>> from fusedstep import torch as optim
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = optim.AdamW([weight], lr=0.1, weight_decay=0.5, grad_clip_norm=1.0)
        >>> (weight * torch.tensor([3.0, 4.0])).sum().backward()
        >>> optimizer.step()
        >>> optimizer.grad_norm, weight.detach()
        (tensor(5., dtype=torch.float64), tensor([0.8500, 0.8500]))

    References:
        Loshchilov and Hutter, 2019, *Decoupled weight decay regularization*, algorithm 2 with the
        learning rate in the decay; `torch.optim.AdamW`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: Eps = 1e-08,
        weight_decay: float | Tensor = 0.01,
        amsgrad: Amsgrad = False,
        *,
        maximize: Maximize = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        grad_clip_norm: GradClipNorm = None,
        grad_clip_value: GradClipValue = None,
        rescale_grad: float | Tensor = 1.0,
        on_nonfinite: OnNonfinite = "propagate",
        grad_clip_scope: GradClipScope = "all",
        skip_grad_norm: SkipGradNorm = None,
        master_weights: bool = False,
        norm_in_backward: bool = False,
        fused_unscale: bool | None = None,
    ) -> None: ...

@final
class RMSprop(Optimizer):
    r"""Drop-in for `torch.optim.RMSprop`.

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
        params: Parameters, pairs of name and parameter, or dicts of param groups, as for
            `torch.optim.Optimizer`. float32, float64, float16, bfloat16, complex64 or complex128.
            One that occurs twice is updated once.
        lr: Learning rate, >= 0. A number, or a tensor of one, which is read at every step; on the
            GPU of the parameters by that GPU, so that nobody waits, and nobody checks its range.
        alpha: Decay rate of the averages of the gradient's square, in [0, 1).
        eps: Added to the square root in the denominator, >= 0; bounds the step.
        weight_decay: Decay coefficient, >= 0, added to the gradient after clipping (L2).
        momentum: Share of the velocity that a step keeps, in [0, 1), dimensionless. A number, or a
            tensor of one, which is read at every step.
        centered: True divides by the standard deviation: the average gradient is kept as state.
        capturable: Accepted, without effect: a step on a GPU can always be captured.
        foreach: Accepted, without effect: there is one implementation.
        maximize: True ascends instead of descending.
        differentiable: Must be False: autograd cannot see into the step.
        next_momentum: The momentum of the coming step, in [0, 1), which the look-ahead of
            Nesterov's form uses when the momentum changes from step to step. None: the same as
            `momentum`, as in torch.
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
            number, or a tensor of one, which is read as that of `lr` is.
        on_nonfinite: What a step does whose gradients hold inf or NaN: compute with them
            ("propagate"), leave everything as it was ("skip"), or do so and raise
            FloatingPointError ("raise").
        grad_clip_scope: Whose norm `grad_clip_norm` limits: of "all" gradients together, of each
            param "group", or of each "array". The result's `grad_norm` is that of all gradients in
            any case.
        skip_grad_norm: A step whose gradients, all together and after `rescale_grad`, have a norm
            that is larger than this (or NaN) leaves everything as it was, > 0. None or inf: none is
            skipped for its norm.
        master_weights: True keeps a float32 master of each float16 or bfloat16 parameter
            (`master_param` in its state). The step updates the master and writes it to the
            parameter, rounded once, in the same pass. What others write into the parameter goes
            into the master, too; only not through `.data`, which autograd cannot see.
        norm_in_backward: True measures each gradient in the backward pass, as soon as it is
            complete and while it is in cache, so that the step need not read it for the norm. The
            clip stays exact. Gradients may change afterwards, but not through `.grad.data`, which
            autograd cannot see.
        fused_unscale: Whether `GradScaler` leaves it to the step to unscale the gradients, which
            saves a pass. None: if a group clips. Set it to False where something else must see
            unscaled gradients before the step.

    State:
        - `square_avg`: The average s of the gradient's square.
        - `grad_avg`: The average a of the gradient, where the form keeps it.
        - `momentum_buffer`: The velocity v, where the form keeps it.
        - `step`: The number t of steps that were applied to the parameter, a tensor on the CPU.
        - `master_param`: The float32 master of a 16-bit parameter, with `master_weights`.

        Tensors have the strides, the sharding and the device of their parameter, and its dtype, but
        float32 for a float16 or bfloat16 one. Counts are brought up to date when `state` or
        `state_dict` is read.

    Raises:
        TypeError: If an argument is of a wrong kind; the message names it and what it was.
        ValueError: If a hyper-parameter is out of range or does not go with another one, or
            `differentiable` is True; from torch, if `params` is empty.

    Numerics:
        Arithmetic in float32 (float64 for float64), each buffer rounded once per step; the same
        bits on every instruction set and for any number of threads. Scalars (bias corrections,
        powers, products) are computed in float64 and rounded once. The weights of an average add
        up to 1 exactly, whatever `betas` are rounded to. A float32 gradient beyond 1.8e19 overflows
        its square: the state becomes inf, and NaN at the next step, rather than freeze its element.
        Against PyTorch's float64 results: below 1e-9 (PyTorch keeps counts in float32).

    Example:
        >>> import torch
        >>> from fusedstep import torch as optim
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = optim.RMSprop([weight], lr=0.1, alpha=0.75, momentum=0.5, nesterov=True)
        >>> (weight * torch.tensor([3.0, 4.0])).sum().backward()
        >>> optimizer.step()
        >>> weight.detach()
        tensor([0.7000, 0.7000])

    References:
        Hinton, 2012, lecture 6e; Graves, 2013, *Generating sequences with recurrent neural
        networks*, eq. 38-45 (centered); `torch.optim.RMSprop`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        alpha: Alpha = 0.99,
        eps: Eps = 1e-08,
        weight_decay: float | Tensor = 0.0,
        momentum: float | Tensor = 0.0,
        centered: Centered = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: Maximize = False,
        differentiable: bool = False,
        *,
        next_momentum: float | None = None,
        nesterov: Nesterov = False,
        eps_in_root: EpsInRoot = False,
        decoupled_weight_decay: DecoupledWeightDecay = False,
        grad_clip_norm: GradClipNorm = None,
        grad_clip_value: GradClipValue = None,
        rescale_grad: float | Tensor = 1.0,
        on_nonfinite: OnNonfinite = "propagate",
        grad_clip_scope: GradClipScope = "all",
        skip_grad_norm: SkipGradNorm = None,
        master_weights: bool = False,
        norm_in_backward: bool = False,
        fused_unscale: bool | None = None,
    ) -> None: ...
