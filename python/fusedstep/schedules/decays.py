"""Schedules that go one way: exponential, linear, polynomial, by inverse time."""

from __future__ import annotations

import math

from fusedstep.ranges import Count, Flag, Real
from fusedstep.schedules.base import Schedule
from fusedstep.schedules.shapes import (
    FACTOR,
    FRACTION,
    interpolated,
    larger,
    power,
    select,
    smaller,
)


class ExponentialLR(Schedule):
    """`base_lr`, multiplied by `gamma` after every epoch.

    Args:
        base_lr: Learning rate of the first epoch, >= 0.
        gamma: Factor per epoch, >= 0.
        last_epoch: The epoch to start from, >= 0.

    Example:
        >>> schedule = ExponentialLR(base_lr=0.5, gamma=0.5)
        >>> schedule.step()
        >>> schedule.current_lr, schedule.at(3)
        (0.25, 0.0625)

    References:
        torch.optim.lr_scheduler.ExponentialLR, braintools.optim.ExponentialLR; Caffe's policy
        `exp`. lucid 2.x lags by one epoch.
    """

    def __init__(self, base_lr: float = 1e-3, gamma: float = 0.95, *, last_epoch: int = 0) -> None:
        super().__init__(base_lr, last_epoch)
        self.gamma = FACTOR.number("gamma", gamma)

    def at(self, t: int) -> float:
        """The learning rate of epoch `t`."""
        return self.base_lr * power(self.gamma, t)


class ExponentialDecayLR(Schedule):
    """`base_lr * decay_rate ** (t / decay_steps)`, not before `transition_begin`.

    Args:
        base_lr: Learning rate until `transition_begin`, >= 0.
        decay_steps: Number of steps that one factor `decay_rate` takes, >= 1.
        decay_rate: The factor, > 0.
        transition_begin: Step that the decay starts from, >= 0.
        staircase: True rounds the exponent down to a whole number.
        end_value: The values stop here, >= 0: a lower limit if `decay_rate` < 1, otherwise an
            upper one. None: no limit.
        last_epoch: The step to start from, >= 0.

    Example:
        >>> schedule = ExponentialDecayLR(base_lr=0.5, decay_steps=2, decay_rate=0.25)
        >>> [schedule.at(t) for t in range(4)]
        [0.5, 0.25, 0.125, 0.0625]
        >>> schedule.staircase, schedule.end_value = True, 0.1
        >>> [schedule.at(t) for t in range(5)]
        [0.5, 0.5, 0.125, 0.125, 0.1]

    References:
        braintools.optim.ExponentialDecayLR, optax.exponential_decay; Keras' ExponentialDecay has
        no `transition_begin` and no `end_value`. torch has no such class.
    """

    def __init__(
        self,
        base_lr: float = 1e-3,
        decay_steps: int = 1000,
        decay_rate: float = 0.96,
        transition_begin: int = 0,
        staircase: bool = False,
        end_value: float | None = None,
        *,
        last_epoch: int = 0,
    ) -> None:
        super().__init__(base_lr, last_epoch)
        self.decay_steps = Count(1)("decay_steps", decay_steps)
        self.decay_rate = Real(0.0, math.inf, "()").number("decay_rate", decay_rate)
        self.transition_begin = Count(0)("transition_begin", transition_begin)
        self.staircase = Flag()("staircase", staircase)
        self.end_value = Real(0.0, optional=True)("end_value", end_value)

    def at(self, t: int) -> float:
        """The learning rate of step `t`."""
        passed = larger(t - self.transition_begin, 0)
        exponent = passed // self.decay_steps if self.staircase else passed / self.decay_steps
        value = select(passed > 0, self.base_lr * power(self.decay_rate, exponent), self.base_lr)
        if self.end_value is None:
            return value
        limit = larger if self.decay_rate < 1.0 else smaller
        return limit(value, self.end_value)


class InverseTimeDecayLR(Schedule):
    """`base_lr / (1 + decay_rate * t / decay_steps) ** power`.

    Special cases: Keras 1 and 2, `SGD(decay=d)`: `decay_rate=d`, counting steps. Caffe's policy
    `inv`: `decay_rate=gamma` and `power`, counting steps. scikit-learn's `invscaling`:
    `decay_rate=1` and `power=power_t`, counting samples (its code) or steps (its documentation).
    `power=0.5` is the 1/sqrt(t) of online learning.

    Args:
        base_lr: Learning rate of the first step, >= 0.
        decay_steps: Number of steps after which the divisor has grown by `decay_rate`, >= 1.
        decay_rate: >= 0.
        power: Exponent of the divisor, >= 0.
        staircase: True rounds `t / decay_steps` down to a whole number.
        last_epoch: The step to start from, >= 0.

    Example:
        >>> schedule = InverseTimeDecayLR(base_lr=0.5, decay_rate=0.25)
        >>> [schedule.at(t) for t in (0, 4, 12)]
        [0.5, 0.25, 0.125]

    References:
        Keras, `keras.optimizers.schedules.InverseTimeDecay` (`power` 1); Caffe, `inv`;
        Robbins and Monro (1951), A stochastic approximation method. torch has no such class.
    """

    def __init__(
        self,
        base_lr: float = 1e-3,
        decay_steps: int = 1,
        decay_rate: float = 1.0,
        power: float = 1.0,
        staircase: bool = False,
        *,
        last_epoch: int = 0,
    ) -> None:
        super().__init__(base_lr, last_epoch)
        self.decay_steps = Count(1)("decay_steps", decay_steps)
        self.decay_rate = FACTOR.number("decay_rate", decay_rate)
        self.power = FACTOR.number("power", power)
        self.staircase = Flag()("staircase", staircase)

    def at(self, t: int) -> float:
        """The learning rate of step `t`."""
        passed = t // self.decay_steps if self.staircase else t / self.decay_steps
        return self.base_lr / power(1.0 + self.decay_rate * passed, self.power)


class LinearLR(Schedule):
    """`base_lr` times a factor that goes straight from `start_factor` to `end_factor`, and stays.

    Args:
        base_lr: Learning rate that the factors multiply, >= 0.
        start_factor: Factor of the first epoch, in [0, 1]. (torch, which computes a value from
            the one before, needs it > 0.)
        end_factor: Factor from epoch `total_iters` on, in [0, 1].
        total_iters: Number of epochs in between, >= 1.
        last_epoch: The epoch to start from, >= 0.

    Example:
        >>> schedule = LinearLR(base_lr=0.5, start_factor=0.5, total_iters=2)
        >>> [schedule.at(t) for t in range(4)]
        [0.25, 0.375, 0.5, 0.5]

    References:
        torch.optim.lr_scheduler.LinearLR, braintools.optim.LinearLR.
    """

    def __init__(
        self,
        base_lr: float = 1e-3,
        start_factor: float = 1.0 / 3.0,
        end_factor: float = 1.0,
        total_iters: int = 5,
        *,
        last_epoch: int = 0,
    ) -> None:
        super().__init__(base_lr, last_epoch)
        self.start_factor = FRACTION.number("start_factor", start_factor)
        self.end_factor = FRACTION.number("end_factor", end_factor)
        self.total_iters = Count(1)("total_iters", total_iters)

    def at(self, t: int) -> float:
        """The learning rate of epoch `t`."""
        share = t / self.total_iters
        return self.base_lr * interpolated(self.start_factor, self.end_factor, share)


class PolynomialLR(Schedule):
    """`base_lr * (1 - t / total_iters) ** power`, and 0 from epoch `total_iters` on.

    Args:
        base_lr: Learning rate of the first epoch, >= 0.
        total_iters: Number of epochs until 0, >= 1.
        power: Exponent, >= 0; 1 is a straight line. With 0 the rate stays `base_lr` for ever.
        last_epoch: The epoch to start from, >= 0.

    Example:
        >>> schedule = PolynomialLR(base_lr=0.5, total_iters=4, power=2)
        >>> [schedule.at(t) for t in (0, 2, 4, 5)]
        [0.5, 0.125, 0.0, 0.0]

    References:
        torch.optim.lr_scheduler.PolynomialLR, braintools.optim.PolynomialLR; Caffe's policy
        `poly`.
    """

    def __init__(
        self,
        base_lr: float = 1e-3,
        total_iters: int = 5,
        power: float = 1.0,
        *,
        last_epoch: int = 0,
    ) -> None:
        super().__init__(base_lr, last_epoch)
        self.total_iters = Count(1)("total_iters", total_iters)
        self.power = FACTOR.number("power", power)

    def at(self, t: int) -> float:
        """The learning rate of epoch `t`."""
        left = larger(self.total_iters - t, 0) / self.total_iters
        return self.base_lr * power(left, self.power)
