"""braintools' optimizers: its arguments and defaults, on the compiled rules.

Beyond braintools' arguments each takes, by keyword, the other hyper-parameters of the class in
`fusedstep`: `on_nonfinite`, `maximize`, `rescale_grad`, `skip_grad_norm`, `dampening`, ...
"""

from __future__ import annotations

import warnings
from typing import Any

import fusedstep.jax as fj
from fusedstep.braintools.optimizer import Optimizer
from fusedstep.braintools.scheduler import LRScheduler


class SGD(Optimizer):
    """Gradient descent, optionally with momentum in its classical or Nesterov's form.

    `g += wd * p; v = momentum * v + g; p -= lr * v`, or `p -= lr * (g + momentum * v)` with
    `nesterov`. Without momentum `v` is `g`, and `nesterov` does not matter.
    """

    def __init__(
        self,
        lr: float | LRScheduler = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        grad_clip_norm: float | None = None,
        grad_clip_value: float | None = None,
        *,
        donate: bool = False,
        **further: Any,
    ) -> None:
        self.momentum, self.nesterov = momentum, nesterov
        looks_ahead = nesterov if momentum else False
        options = {"momentum": momentum, "nesterov": looks_ahead, **further}
        super().__init__(fj.sgd, options, lr, weight_decay, grad_clip_norm, grad_clip_value, donate)


class Momentum(Optimizer):
    """Gradient descent with a velocity: `v = momentum * v + g; p -= lr * v`."""

    def __init__(
        self,
        lr: float | LRScheduler = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        grad_clip_norm: float | None = None,
        grad_clip_value: float | None = None,
        *,
        donate: bool = False,
        **further: Any,
    ) -> None:
        self.momentum = momentum
        options = {"momentum": momentum, **further}
        super().__init__(
            fj.momentum, options, lr, weight_decay, grad_clip_norm, grad_clip_value, donate
        )


class MomentumNesterov(Optimizer):
    """Nesterov's momentum: `v = momentum * v + g; p -= lr * (g + momentum * v)`."""

    def __init__(
        self,
        lr: float | LRScheduler = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        grad_clip_norm: float | None = None,
        grad_clip_value: float | None = None,
        *,
        donate: bool = False,
        **further: Any,
    ) -> None:
        self.momentum = momentum
        options = {"momentum": momentum, **further}
        super().__init__(
            fj.nesterov, options, lr, weight_decay, grad_clip_norm, grad_clip_value, donate
        )


class Adam(Optimizer):
    """Adam, with decay added to the gradient.

    `beta1` and `beta2` are braintools' deprecated names for the elements of `betas`. `amsgrad` is
    refused: optax keeps the largest *bias-corrected* average, the compiled rule (PyTorch's and the
    paper's) the largest average.
    """

    def __init__(
        self,
        lr: float | LRScheduler = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        beta1: float | None = None,
        beta2: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        grad_clip_norm: float | None = None,
        grad_clip_value: float | None = None,
        *,
        donate: bool = False,
        **further: Any,
    ) -> None:
        if amsgrad:
            raise ValueError(
                "amsgrad: braintools' takes the maximum of the bias-corrected average, which no "
                "compiled rule does; fusedstep.jax.adam(amsgrad=True) has PyTorch's form"
            )
        betas = (_deprecated("beta1", beta1, betas[0]), _deprecated("beta2", beta2, betas[1]))
        self.betas, self.eps, self.amsgrad = betas, eps, False
        options = {"betas": betas, "eps": eps, **further}
        super().__init__(
            fj.adam, options, lr, weight_decay, grad_clip_norm, grad_clip_value, donate
        )


def _deprecated(name: str, value: float | None, default: float) -> float:
    if value is None:
        return default
    warnings.warn(f"{name}: pass betas=(beta1, beta2)", DeprecationWarning, stacklevel=3)
    return value


class AdamW(Optimizer):
    """Adam with decoupled weight decay: `p -= lr * (m / (sqrt(s) + eps) + wd * p)`."""

    def __init__(
        self,
        lr: float | LRScheduler = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        grad_clip_norm: float | None = None,
        grad_clip_value: float | None = None,
        *,
        donate: bool = False,
        **further: Any,
    ) -> None:
        self.betas, self.eps = betas, eps
        options = {"betas": betas, "eps": eps, **further}
        super().__init__(
            fj.adamw, options, lr, weight_decay, grad_clip_norm, grad_clip_value, donate
        )


class Nadam(Optimizer):
    """Adam with Nesterov's momentum and its schedule, in PyTorch's form."""

    def __init__(
        self,
        lr: float | LRScheduler = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum_decay: float = 4e-3,
        grad_clip_norm: float | None = None,
        grad_clip_value: float | None = None,
        *,
        donate: bool = False,
        **further: Any,
    ) -> None:
        self.betas, self.eps, self.momentum_decay = betas, eps, momentum_decay
        options = {"betas": betas, "eps": eps, "momentum_decay": momentum_decay, **further}
        super().__init__(
            fj.nadam, options, lr, weight_decay, grad_clip_norm, grad_clip_value, donate
        )


class RMSprop(Optimizer):
    """RMSprop with `eps` under the root: `g / sqrt(s + eps)`, as optax has it."""

    def __init__(
        self,
        lr: float | LRScheduler = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        grad_clip_norm: float | None = None,
        grad_clip_value: float | None = None,
        *,
        donate: bool = False,
        **further: Any,
    ) -> None:
        self.alpha, self.eps, self.momentum, self.centered = alpha, eps, momentum, centered
        options = {
            "alpha": alpha,
            "eps": eps,
            "eps_in_root": True,
            "momentum": momentum,
            "centered": centered,
            **further,
        }
        super().__init__(
            fj.rmsprop, options, lr, weight_decay, grad_clip_norm, grad_clip_value, donate
        )
