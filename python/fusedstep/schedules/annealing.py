"""Cosine annealing and warm-up."""

from __future__ import annotations

from functools import partial

from fusedstep.ranges import Count, shown
from fusedstep.schedules.base import LEARNING_RATE, Schedule
from fusedstep.schedules.shapes import (
    choose,
    half_cosine,
    interpolated,
    is_array,
    passed,
    select,
    smaller,
)


class CosineAnnealingLR(Schedule):
    """Half a cosine from `base_lr` to `eta_min` within `T_max` epochs, then back up, and so on.

    After `T_max` it rises again, as in torch (in closed form) and braintools <= 0.1.10;
    braintools >= 0.2 stays at `eta_min`. For that, and for training that ends at `T_max`, take
    `WarmupCosineSchedule(warmup_steps=0)`.

    Args:
        base_lr: Learning rate of the first epoch, >= 0.
        T_max: Number of epochs down to `eta_min`, >= 1.
        eta_min: Learning rate there, >= 0.
        last_epoch: The epoch to start from, >= 0.

    Example:
        >>> schedule = CosineAnnealingLR(base_lr=0.5, T_max=2)
        >>> [round(schedule.at(t), 6) for t in range(5)]
        [0.5, 0.25, 0.0, 0.25, 0.5]

    References:
        Loshchilov and Hutter (2017), SGDR: Stochastic gradient descent with warm restarts,
        arXiv:1608.03983; torch.optim.lr_scheduler.CosineAnnealingLR.
    """

    def __init__(
        self,
        base_lr: float = 1e-3,
        T_max: int = 50,
        eta_min: float = 0.0,
        *,
        last_epoch: int = 0,
    ) -> None:
        super().__init__(base_lr, last_epoch)
        self.T_max = Count(1)("T_max", T_max)
        self.eta_min = LEARNING_RATE.number("eta_min", eta_min)

    def at(self, t: int) -> float:
        """The learning rate of epoch `t`."""
        place = (t % (2 * self.T_max)) / self.T_max  # exact, however many periods came before
        return interpolated(self.eta_min, self.base_lr, half_cosine(place))


class CosineAnnealingWarmRestarts(Schedule):
    """Half a cosine from `base_lr` towards `eta_min`, again and again, each `T_mult` times longer.

    Epochs are whole numbers; where torch is given fractions of them, count steps.

    Args:
        base_lr: Learning rate after each restart, >= 0.
        T_0: Number of epochs until the first restart, >= 1.
        T_mult: Factor between the lengths of consecutive runs, a whole number >= 1.
        eta_min: Learning rate that a run goes towards, >= 0; the restart comes before it.
        last_epoch: The epoch to start from, >= 0.

    Example:
        >>> schedule = CosineAnnealingWarmRestarts(base_lr=0.5, T_0=2, T_mult=2)
        >>> [round(schedule.at(t), 6) for t in range(7)]
        [0.5, 0.25, 0.5, 0.426777, 0.25, 0.073223, 0.5]

    References:
        Loshchilov and Hutter (2017), SGDR, arXiv:1608.03983;
        torch.optim.lr_scheduler.CosineAnnealingWarmRestarts.
    """

    def __init__(
        self,
        base_lr: float = 1e-3,
        T_0: int = 10,
        T_mult: int = 1,
        eta_min: float = 0.0,
        *,
        last_epoch: int = 0,
    ) -> None:
        super().__init__(base_lr, last_epoch)
        self.T_0 = Count(1)("T_0", T_0)
        self.T_mult = Count(1)("T_mult", T_mult)
        self.eta_min = LEARNING_RATE.number("eta_min", eta_min)

    def at(self, t: int) -> float:
        """The learning rate of epoch `t`."""
        if self.T_mult == 1:
            return self._in_run(t % self.T_0, self.T_0)
        # The runs that may have begun; a logarithm would round, and miss the borders of long runs.
        end = 2**31 if is_array(t) else t + 1
        begins, length = [0], self.T_0
        while begins[-1] + length < end:
            begins.append(begins[-1] + length)
            length *= self.T_mult
        runs = [
            partial(self._in_run, t - begin, self.T_0 * self.T_mult**k)
            for k, begin in enumerate(begins)
        ]
        return choose(passed(begins[1:], t), runs)

    def _in_run(self, t: int, length: int) -> float:
        place = t / float(length)  # the last run may be longer than an integer of t's kind can be
        return interpolated(self.eta_min, self.base_lr, half_cosine(place))


class WarmupCosineSchedule(Schedule):
    """Straight up to `base_lr` within `warmup_steps`, half a cosine down to `eta_min`, and stays.

    Args:
        base_lr: Learning rate at the end of the warm-up, >= 0.
        warmup_steps: Number of steps of the warm-up, >= 0.
        total_steps: Step from which the rate is `eta_min`, > `warmup_steps`.
        warmup_start_lr: Learning rate of the first step, >= 0. With 0 that step changes nothing.
        eta_min: Learning rate at the end, >= 0.
        last_epoch: The step to start from, >= 0.

    Example:
        >>> schedule = WarmupCosineSchedule(base_lr=0.5, warmup_steps=2, total_steps=6)
        >>> [round(schedule.at(t), 6) for t in range(8)]
        [0.0, 0.25, 0.5, 0.426777, 0.25, 0.073223, 0.0, 0.0]

    References:
        braintools.optim.WarmupCosineSchedule, optax.warmup_cosine_decay_schedule; in torch, a
        SequentialLR of LinearLR and CosineAnnealingLR.
    """

    def __init__(
        self,
        base_lr: float = 1e-3,
        warmup_steps: int = 1000,
        total_steps: int = 10_000,
        warmup_start_lr: float = 0.0,
        eta_min: float = 0.0,
        *,
        last_epoch: int = 0,
    ) -> None:
        super().__init__(base_lr, last_epoch)
        self.warmup_steps = Count(0)("warmup_steps", warmup_steps)
        self.total_steps = Count(1)("total_steps", total_steps)
        if self.total_steps <= self.warmup_steps:
            raise ValueError(
                f"total_steps: expected more than warmup_steps={shown(self.warmup_steps)}, got "
                f"{shown(self.total_steps)}"
            )
        self.warmup_start_lr = LEARNING_RATE.number("warmup_start_lr", warmup_start_lr)
        self.eta_min = LEARNING_RATE.number("eta_min", eta_min)

    def at(self, t: int) -> float:
        """The learning rate of step `t`."""
        rise = interpolated(self.warmup_start_lr, self.base_lr, t / max(self.warmup_steps, 1))
        share = (t - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        fall = interpolated(self.eta_min, self.base_lr, half_cosine(smaller(share, 1.0)))
        return select(t < self.warmup_steps, rise, fall)


class WarmupScheduler(Schedule):
    """Straight from `warmup_start_lr` to `base_lr` within `warmup_epochs`, and stays.

    Args:
        base_lr: Learning rate after the warm-up, >= 0.
        warmup_epochs: Number of epochs of the warm-up, >= 0; with 0 there is none.
        warmup_start_lr: Learning rate of the first epoch, >= 0. With 0 that epoch changes nothing.
        last_epoch: The epoch to start from, >= 0.

    Example:
        >>> schedule = WarmupScheduler(base_lr=0.5, warmup_epochs=2)
        >>> [schedule.at(t) for t in range(4)]
        [0.0, 0.25, 0.5, 0.5]

    References:
        Goyal et al. (2017), Accurate, large minibatch SGD, arXiv:1706.02677, section 2.2;
        braintools.optim.WarmupScheduler (whose releases <= 0.1 made the first step with
        `base_lr`). In torch, LinearLR.
    """

    def __init__(
        self,
        base_lr: float = 1e-3,
        warmup_epochs: int = 5,
        warmup_start_lr: float = 0.0,
        *,
        last_epoch: int = 0,
    ) -> None:
        super().__init__(base_lr, last_epoch)
        self.warmup_epochs = Count(0)("warmup_epochs", warmup_epochs)
        self.warmup_start_lr = LEARNING_RATE.number("warmup_start_lr", warmup_start_lr)

    def at(self, t: int) -> float:
        """The learning rate of epoch `t`."""
        if self.warmup_epochs == 0:
            return self.base_lr
        return interpolated(self.warmup_start_lr, self.base_lr, t / self.warmup_epochs)
