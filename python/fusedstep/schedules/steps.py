"""Schedules that are constant for a while, then jump."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from fusedstep.ranges import Count
from fusedstep.schedules.base import LEARNING_RATE, DerivedSchedule, Schedule
from fusedstep.schedules.shapes import (
    FACTOR,
    FRACTION,
    choose,
    increasing,
    passed,
    power,
    reals,
    select,
)


class ConstantLR(Schedule):
    """`factor * base_lr` for the first `total_iters` epochs, then `base_lr`.

    Args:
        base_lr: Learning rate after the first epochs, >= 0.
        factor: In [0, 1].
        total_iters: Number of epochs with the factor, >= 0.
        last_epoch: The epoch to start from, >= 0.

    Example:
        >>> schedule = ConstantLR(base_lr=0.5, factor=0.5, total_iters=2)
        >>> [schedule.at(t) for t in range(4)]
        [0.25, 0.25, 0.5, 0.5]

    References:
        torch.optim.lr_scheduler.ConstantLR, braintools.optim.ConstantLR.
    """

    def __init__(
        self,
        base_lr: float = 1e-3,
        factor: float = 1.0 / 3.0,
        total_iters: int = 5,
        *,
        last_epoch: int = 0,
    ) -> None:
        super().__init__(base_lr, last_epoch)
        self.factor = FRACTION.number("factor", factor)
        self.total_iters = Count(0)("total_iters", total_iters)

    def at(self, t: int) -> float:
        """The learning rate of epoch `t`."""
        return select(t < self.total_iters, self.base_lr * self.factor, self.base_lr)


class StepLR(Schedule):
    """`base_lr`, multiplied by `gamma` after every `step_size` epochs.

    Args:
        base_lr: Learning rate of the first epochs, >= 0.
        step_size: Number of epochs between two drops, >= 1.
        gamma: Factor of a drop, >= 0.
        last_epoch: The epoch to start from, >= 0.

    Example:
        >>> schedule = StepLR(base_lr=0.5, step_size=2, gamma=0.5)
        >>> [schedule.at(t) for t in range(5)]
        [0.5, 0.5, 0.25, 0.25, 0.125]

    References:
        torch.optim.lr_scheduler.StepLR, braintools.optim.StepLR; Caffe's policy `step`.
    """

    def __init__(
        self,
        base_lr: float = 1e-3,
        step_size: int = 30,
        gamma: float = 0.1,
        *,
        last_epoch: int = 0,
    ) -> None:
        super().__init__(base_lr, last_epoch)
        self.step_size = Count(1)("step_size", step_size)
        self.gamma = FACTOR.number("gamma", gamma)

    def at(self, t: int) -> float:
        """The learning rate of epoch `t`."""
        return self.base_lr * power(self.gamma, t // self.step_size)


class MultiStepLR(Schedule):
    """`base_lr`, multiplied by `gamma` at each of the milestones.

    Epoch `m` is the first one with the new rate if `m` is a milestone. lucid 2.x dropped one
    epoch later.

    Args:
        base_lr: Learning rate before the first milestone, >= 0.
        milestones: Epochs, increasing, >= 0. (torch sorts them and takes a repeated one twice;
            here both are refused.)
        gamma: Factor of a drop, >= 0.
        last_epoch: The epoch to start from, >= 0.

    Example:
        >>> schedule = MultiStepLR(base_lr=0.5, milestones=(1, 3), gamma=0.5)
        >>> [schedule.at(t) for t in range(5)]
        [0.5, 0.25, 0.25, 0.125, 0.125]

    References:
        torch.optim.lr_scheduler.MultiStepLR, braintools.optim.MultiStepLR; Caffe's policy
        `multistep`.
    """

    def __init__(
        self,
        base_lr: float = 1e-3,
        milestones: Iterable[int] = (30, 60, 90),
        gamma: float = 0.1,
        *,
        last_epoch: int = 0,
    ) -> None:
        super().__init__(base_lr, last_epoch)
        self.milestones = increasing("milestones", milestones)
        self.gamma = FACTOR.number("gamma", gamma)

    def at(self, t: int) -> float:
        """The learning rate of epoch `t`."""
        return self.base_lr * power(self.gamma, passed(self.milestones, t))


class PiecewiseConstantSchedule(DerivedSchedule):
    """The first of `values`, the second from the first boundary on, and so forth.

    A boundary is the first epoch of the next value, as in braintools. Keras' and TensorFlow's
    PiecewiseConstantDecay still gives the old value there: their boundary `b` is `b + 1` here.

    Args:
        boundaries: Epochs, increasing, >= 0.
        values: Learning rates, >= 0, one more than boundaries. They are absolute: there is no
            `base_lr` to give, and reading it gives `values[0]`.
        last_epoch: The epoch to start from, >= 0.

    Example:
        >>> schedule = PiecewiseConstantSchedule(boundaries=(2, 3), values=(0.1, 0.5, 0.02))
        >>> [schedule.at(t) for t in range(5)]
        [0.1, 0.1, 0.5, 0.02, 0.02]

    References:
        braintools.optim.PiecewiseConstantSchedule; optax.piecewise_constant_schedule takes
        factors instead of values.
    """

    def __init__(
        self,
        boundaries: Iterable[int] = (1000, 2000),
        values: Iterable[float] = (1.0, 0.1, 0.01),
        *,
        last_epoch: int = 0,
    ) -> None:
        super().__init__(last_epoch)
        self.boundaries = increasing("boundaries", boundaries)
        self.values = reals("values", values, LEARNING_RATE)
        if len(self.values) != len(self.boundaries) + 1:
            raise ValueError(
                f"values: expected {len(self.boundaries) + 1} numbers, one more than boundaries, "
                f"got {len(self.values)}"
            )

    def _base_lr(self) -> float:
        return self.values[0]

    def at(self, t: int) -> float:
        """The learning rate of epoch `t`."""
        values = [partial(float, value) for value in self.values]
        return choose(passed(self.boundaries, t), values)
