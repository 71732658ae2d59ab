"""Schedules made of other schedules, or of a function."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial

from fusedstep.ranges import shown
from fusedstep.schedules.base import LEARNING_RATE, DerivedSchedule, Schedule
from fusedstep.schedules.plateau import ReduceLROnPlateau
from fusedstep.schedules.shapes import choose, increasing, is_array, larger, passed


class _Composite(DerivedSchedule):
    """A schedule that reads others as formulas and leaves their counters alone."""

    def __init__(self, schedules: Iterable[Schedule], last_epoch: int) -> None:
        super().__init__(last_epoch)
        if isinstance(schedules, Schedule) or not isinstance(schedules, Iterable):
            raise TypeError(f"schedules: expected a sequence of them, got {shown(schedules)}")
        self.schedules = tuple(schedules)
        if not self.schedules:
            raise ValueError("schedules: expected at least one, got none")
        for index, schedule in enumerate(self.schedules):
            if not isinstance(schedule, Schedule):
                raise TypeError(
                    f"schedules[{index}]: expected a learning-rate schedule, got {shown(schedule)}"
                )
            if isinstance(schedule, ReduceLROnPlateau):
                raise TypeError(
                    f"schedules[{index}]: a ReduceLROnPlateau follows a metric and has no value at "
                    "a given epoch"
                )

    def _base_lr(self) -> float:
        return self.schedules[0].base_lr


class SequentialLR(_Composite):
    """One schedule after the other; each one begins with its epoch 0 at its milestone.

    The members are read as formulas (`at`): their own counters stay where they are, and what was
    assigned to their `current_lr` does not matter.

    Args:
        schedules: Schedules, at least one. Each has its own `base_lr`.
        milestones: The first epochs of the second, third, ... schedule: increasing, >= 1, one
            fewer than schedules.
        last_epoch: The epoch to start from, >= 0.

    Attributes:
        base_lr (float): That of the first schedule; assign to the members' instead.

    Example:
        >>> warmup = LinearLR(base_lr=0.5, start_factor=0.5, total_iters=2)
        >>> decay = ExponentialLR(base_lr=0.5, gamma=0.5)
        >>> schedule = SequentialLR([warmup, decay], milestones=[2])
        >>> [schedule.at(t) for t in range(5)]
        [0.25, 0.375, 0.5, 0.25, 0.125]

    References:
        torch.optim.lr_scheduler.SequentialLR (which moves its members), braintools.optim.
    """

    def __init__(
        self, schedules: Iterable[Schedule], milestones: Iterable[int], *, last_epoch: int = 0
    ) -> None:
        super().__init__(schedules, last_epoch)
        self.milestones = increasing("milestones", milestones, low=1)
        if len(self.milestones) != len(self.schedules) - 1:
            raise ValueError(
                f"milestones: expected {len(self.schedules) - 1}, one fewer than schedules, got "
                f"{len(self.milestones)}"
            )

    def at(self, t: int) -> float:
        """The learning rate of epoch `t`."""
        begins = (0, *self.milestones)
        values = [
            partial(schedule.at, larger(t - begin, 0))
            for schedule, begin in zip(self.schedules, begins, strict=True)
        ]
        return choose(passed(self.milestones, t), values)


class ChainedScheduler(_Composite):
    """The first schedule, multiplied by the factors `at(t) / base_lr` of all the others.

    The members are read as formulas (`at`): their own counters stay where they are. With the same
    `base_lr` and members that only multiply (`ConstantLR`, `StepLR`, `MultiStepLR`,
    `ExponentialLR`, `LinearLR`, `PolynomialLR`) this is what torch computes. In torch, what other
    members give there depends on what was done to the rate before; here they are factors as well.

    Args:
        schedules: Schedules, at least one. From the second on their `base_lr` has to be > 0.
        last_epoch: The epoch to start from, >= 0.

    Attributes:
        base_lr (float): That of the first schedule; assign to the members' instead.

    Example:
        >>> warmup = ConstantLR(base_lr=0.5, factor=0.5, total_iters=2)
        >>> decay = ExponentialLR(base_lr=0.5, gamma=0.5)
        >>> schedule = ChainedScheduler([warmup, decay])
        >>> [schedule.at(t) for t in range(4)]
        [0.25, 0.125, 0.125, 0.0625]

    References:
        torch.optim.lr_scheduler.ChainedScheduler, braintools.optim.ChainedScheduler.
    """

    def __init__(self, schedules: Iterable[Schedule], *, last_epoch: int = 0) -> None:
        super().__init__(schedules, last_epoch)
        for index, schedule in enumerate(self.schedules[1:], 1):
            if schedule.base_lr == 0.0:
                raise ValueError(
                    f"schedules[{index}]: expected a base_lr > 0, to which the factors relate, "
                    f"got {schedule.base_lr}"
                )

    def at(self, t: int) -> float:
        """The learning rate of epoch `t`."""
        first, *others = self.schedules
        return first.at(t) * math.prod(each.at(t) / each.base_lr for each in others)


class LambdaLR(Schedule):
    """`base_lr * lr_lambda(t)`.

    Args:
        base_lr: The learning rate that the function multiplies, >= 0.
        lr_lambda: A pure function of the epoch, from 0, with values >= 0. It is not in the
            state: load a state into a schedule that was made with the same function.
        last_epoch: The epoch to start from, >= 0.

    Example:
        >>> schedule = LambdaLR(base_lr=0.5, lr_lambda=lambda epoch: 1 / (1 + epoch))
        >>> [schedule.at(t) for t in (0, 1, 3)]
        [0.5, 0.25, 0.125]

    References:
        torch.optim.lr_scheduler.LambdaLR. Also, `lr` of an optimizer may be a function of the
        number of steps.
    """

    def __init__(
        self, base_lr: float, lr_lambda: Callable[[int], float], *, last_epoch: int = 0
    ) -> None:
        super().__init__(base_lr, last_epoch)
        if not callable(lr_lambda):
            raise TypeError(f"lr_lambda: expected a function of the epoch, got {shown(lr_lambda)}")
        self.lr_lambda = lr_lambda

    def at(self, t: int) -> float:
        """The learning rate of epoch `t`."""
        factor = self.lr_lambda(t)
        if not is_array(factor):
            factor = LEARNING_RATE.number(f"lr_lambda({t})", factor)
        return self.base_lr * factor
