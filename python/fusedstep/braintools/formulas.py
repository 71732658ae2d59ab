"""braintools' schedulers that are formulas of the epoch: those of `fusedstep.schedules`.

They are evaluated inside of compiled code, too, and have braintools' arguments: `base_lr` may be a
list, one rate per param group, and `last_epoch` comes last.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

from fusedstep import schedules
from fusedstep.braintools.scheduler import LRScheduler, as_rates
from fusedstep.braintools.variants import CosineAnnealing, OneCycle


class _Formula(LRScheduler):
    """A scheduler whose rates are a formula of the epoch: a schedule per group.

    The schedules are made anew from the attributes, so one that is assigned takes effect at once.
    """

    @abstractmethod
    def _schedule(self, group: int) -> schedules.Schedule: ...

    def get_lr(self) -> list[float]:
        """The rates of epoch `last_epoch.value`, one per element of `base_lrs`."""
        epoch = self.last_epoch.value
        return [self._schedule(group).at(epoch) for group in range(len(self.base_lrs))]


class ConstantLR(_Formula):
    """`factor * base_lr` for the first `total_iters` epochs, then `base_lr`.

    Constants, formula and examples are those of `fusedstep.ConstantLR`.
    """

    def __init__(
        self,
        base_lr: float | Sequence[float] = 1e-3,
        factor: float = 1.0 / 3,
        total_iters: int = 5,
        last_epoch: int = 0,
    ) -> None:
        self.factor, self.total_iters = factor, total_iters
        super().__init__(base_lr, last_epoch)

    def _schedule(self, group: int) -> schedules.Schedule:
        return schedules.ConstantLR(self.base_lrs[group], self.factor, self.total_iters)


class StepLR(_Formula):
    """`base_lr`, multiplied by `gamma` after every `step_size` epochs.

    Constants, formula and examples are those of `fusedstep.StepLR`.
    """

    def __init__(
        self,
        base_lr: float | Sequence[float] = 1e-3,
        step_size: int = 30,
        gamma: float = 0.1,
        last_epoch: int = 0,
    ) -> None:
        self.step_size, self.gamma = step_size, gamma
        super().__init__(base_lr, last_epoch)

    def _schedule(self, group: int) -> schedules.Schedule:
        return schedules.StepLR(self.base_lrs[group], self.step_size, self.gamma)


class MultiStepLR(_Formula):
    """`base_lr`, multiplied by `gamma` at each of the milestones, which are sorted.

    Constants, formula and examples are those of `fusedstep.MultiStepLR`.
    """

    def __init__(
        self,
        base_lr: float | Sequence[float] = 1e-3,
        milestones: Sequence[int] = (30, 60, 90),
        gamma: float = 0.1,
        last_epoch: int = 0,
    ) -> None:
        self.milestones, self.gamma = tuple(sorted(milestones)), gamma
        super().__init__(base_lr, last_epoch)

    def _schedule(self, group: int) -> schedules.Schedule:
        return schedules.MultiStepLR(self.base_lrs[group], self.milestones, self.gamma)


class ExponentialLR(_Formula):
    """`base_lr`, multiplied by `gamma` after every epoch.

    Constants, formula and examples are those of `fusedstep.ExponentialLR`.
    """

    def __init__(
        self,
        base_lr: float | Sequence[float] = 1e-3,
        gamma: float = 0.95,
        last_epoch: int = 0,
    ) -> None:
        self.gamma = gamma
        super().__init__(base_lr, last_epoch)

    def _schedule(self, group: int) -> schedules.Schedule:
        return schedules.ExponentialLR(self.base_lrs[group], self.gamma)


class ExponentialDecayLR(_Formula):
    """`base_lr * decay_rate ** (t / decay_steps)`, not before `transition_begin`.

    Constants, formula and examples are those of `fusedstep.ExponentialDecayLR`.
    """

    def __init__(
        self,
        base_lr: float | Sequence[float] = 1e-3,
        decay_steps: int = 1000,
        decay_rate: float = 0.96,
        transition_begin: int = 0,
        staircase: bool = False,
        end_value: float | None = None,
        last_epoch: int = 0,
    ) -> None:
        self.decay_steps, self.decay_rate = decay_steps, decay_rate
        self.transition_begin, self.staircase = transition_begin, staircase
        self.end_value = end_value
        super().__init__(base_lr, last_epoch)

    def _schedule(self, group: int) -> schedules.Schedule:
        return schedules.ExponentialDecayLR(
            self.base_lrs[group],
            self.decay_steps,
            self.decay_rate,
            self.transition_begin,
            self.staircase,
            self.end_value,
        )


class CosineAnnealingLR(_Formula):
    """Half a cosine from `base_lr` to `eta_min` within `T_max` epochs, where it stays.

    (`fusedstep.CosineAnnealingLR` rises again after `T_max`, as PyTorch's does.)

    Example:
        >>> import fusedstep.braintools as optim
        >>> scheduler = optim.CosineAnnealingLR(base_lr=0.5, T_max=1)
        >>> rates = []
        >>> for epoch in range(3):
        ...     rates.append(round(scheduler.get_last_lr()[0], 6))
        ...     scheduler.step()
        >>> rates
        [0.5, 0.0, 0.0]
    """

    def __init__(
        self,
        base_lr: float | Sequence[float] = 1e-3,
        T_max: int = 50,
        eta_min: float = 0.0,
        last_epoch: int = 0,
    ) -> None:
        self.T_max, self.eta_min = T_max, eta_min
        super().__init__(base_lr, last_epoch)

    def _schedule(self, group: int) -> schedules.Schedule:
        return CosineAnnealing(self.base_lrs[group], self.T_max, self.eta_min)


class CosineAnnealingWarmRestarts(_Formula):
    """Half a cosine from `base_lr` towards `eta_min`, again and again, each `T_mult` times longer.

    The place in a run follows from the epoch; braintools counts it on its own and starts a
    scheduler with `last_epoch` at the beginning of a run.

    Constants, formula and examples are those of `fusedstep.CosineAnnealingWarmRestarts`.
    """

    def __init__(
        self,
        base_lr: float | Sequence[float] = 1e-3,
        T_0: int = 10,
        T_mult: int = 1,
        eta_min: float = 0.0,
        last_epoch: int = 0,
    ) -> None:
        self.T_0, self.T_mult, self.eta_min = T_0, T_mult, eta_min
        super().__init__(base_lr, last_epoch)

    def _schedule(self, group: int) -> schedules.Schedule:
        return schedules.CosineAnnealingWarmRestarts(
            self.base_lrs[group], self.T_0, self.T_mult, self.eta_min
        )


class PolynomialLR(_Formula):
    """`base_lr * (1 - t / total_iters) ** power`, and 0 from epoch `total_iters` on.

    Constants, formula and examples are those of `fusedstep.PolynomialLR`.
    """

    def __init__(
        self,
        base_lr: float | Sequence[float] = 1e-3,
        total_iters: int = 5,
        power: float = 1.0,
        last_epoch: int = 0,
    ) -> None:
        self.total_iters, self.power = total_iters, power
        super().__init__(base_lr, last_epoch)

    def _schedule(self, group: int) -> schedules.Schedule:
        return schedules.PolynomialLR(self.base_lrs[group], self.total_iters, self.power)


class LinearLR(_Formula):
    """`base_lr` times a factor that goes straight from `start_factor` to `end_factor`.

    Constants, formula and examples are those of `fusedstep.LinearLR`.
    """

    def __init__(
        self,
        base_lr: float | Sequence[float] = 1e-3,
        start_factor: float = 1.0 / 3,
        end_factor: float = 1.0,
        total_iters: int = 5,
        last_epoch: int = 0,
    ) -> None:
        self.start_factor, self.end_factor = start_factor, end_factor
        self.total_iters = total_iters
        super().__init__(base_lr, last_epoch)

    def _schedule(self, group: int) -> schedules.Schedule:
        return schedules.LinearLR(
            self.base_lrs[group], self.start_factor, self.end_factor, self.total_iters
        )


class WarmupScheduler(_Formula):
    """Straight from `warmup_start_lr` to `base_lr` within `warmup_epochs`, and stays.

    Constants, formula and examples are those of `fusedstep.WarmupScheduler`.
    """

    def __init__(
        self,
        base_lr: float | Sequence[float] = 1e-3,
        warmup_epochs: int = 5,
        warmup_start_lr: float = 0.0,
        last_epoch: int = 0,
    ) -> None:
        self.warmup_epochs, self.warmup_start_lr = warmup_epochs, warmup_start_lr
        super().__init__(base_lr, last_epoch)

    def _schedule(self, group: int) -> schedules.Schedule:
        return schedules.WarmupScheduler(
            self.base_lrs[group], self.warmup_epochs, self.warmup_start_lr
        )


class WarmupCosineSchedule(_Formula):
    """Straight up to `base_lr` within `warmup_steps`, half a cosine to `eta_min`, and stays.

    Constants, formula and examples are those of `fusedstep.WarmupCosineSchedule`.
    """

    def __init__(
        self,
        base_lr: float | Sequence[float] = 1e-3,
        warmup_steps: int = 1000,
        total_steps: int = 10000,
        warmup_start_lr: float = 0.0,
        eta_min: float = 0.0,
        last_epoch: int = 0,
    ) -> None:
        self.warmup_steps, self.total_steps = warmup_steps, total_steps
        self.warmup_start_lr, self.eta_min = warmup_start_lr, eta_min
        super().__init__(base_lr, last_epoch)

    def _schedule(self, group: int) -> schedules.Schedule:
        return schedules.WarmupCosineSchedule(
            self.base_lrs[group],
            self.warmup_steps,
            self.total_steps,
            self.warmup_start_lr,
            self.eta_min,
        )


class PiecewiseConstantSchedule(_Formula):
    """The first of `values`, the second from the first boundary on, and so forth.

    The values are absolute: `base_lr` does not enter them, and all groups have the same.

    Constants and formula are those of `fusedstep.PiecewiseConstantSchedule`.

    Example:
        >>> import fusedstep.braintools as optim
        >>> scheduler = optim.PiecewiseConstantSchedule(boundaries=[1, 2], values=[0.5, 1.0, 0.1])
        >>> rates = []
        >>> for epoch in range(3):
        ...     rates.append(round(scheduler.get_last_lr()[0], 6))
        ...     scheduler.step()
        >>> rates
        [0.5, 1.0, 0.1]
    """

    def __init__(
        self,
        base_lr: float | Sequence[float] = 1e-3,
        boundaries: Sequence[int] | None = None,
        values: Sequence[float] | None = None,
        last_epoch: int = 0,
    ) -> None:
        self.boundaries = [1000, 2000] if boundaries is None else list(boundaries)
        self.values = [1.0, 0.1, 0.01] if values is None else list(values)
        super().__init__(base_lr, last_epoch)

    def _schedule(self, group: int) -> schedules.Schedule:  # noqa: ARG002
        return schedules.PiecewiseConstantSchedule(self.boundaries, self.values)


class CyclicLR(_Formula):
    """Straight from `base_lr` to `max_lr` and back, in cycles of the same length.

    `step_size_down` is respected (braintools measures both halves by `step_size_up`). `max_lr` may
    be a list, one per group; its last element serves further groups.

    Constants and formula are those of `fusedstep.CyclicLR`.

    Example:
        >>> import fusedstep.braintools as optim
        >>> scheduler = optim.CyclicLR(base_lr=0.0, max_lr=1.0, step_size_up=2)
        >>> rates = []
        >>> for epoch in range(3):
        ...     rates.append(round(scheduler.get_last_lr()[0], 6))
        ...     scheduler.step()
        >>> rates
        [0.0, 0.5, 1.0]
    """

    def __init__(
        self,
        base_lr: float | Sequence[float] = 1e-3,
        max_lr: float | Sequence[float] = 1e-2,
        step_size_up: int = 2000,
        step_size_down: int | None = None,
        mode: str = "triangular",
        gamma: float = 1.0,
        scale_fn: Callable[[int], float] | None = None,
        scale_mode: str = "cycle",
        last_epoch: int = 0,
    ) -> None:
        self.max_lrs = as_rates("max_lr", max_lr)
        self.step_size_up, self.step_size_down = step_size_up, step_size_down
        self.mode, self.gamma = mode, gamma
        self.scale_fn, self.scale_mode = scale_fn, scale_mode
        super().__init__(base_lr, last_epoch)

    def _schedule(self, group: int) -> schedules.Schedule:
        return schedules.CyclicLR(
            self.base_lrs[group],
            self.max_lrs[min(group, len(self.max_lrs) - 1)],
            self.step_size_up,
            self.step_size_down,
            self.mode,
            self.gamma,
            self.scale_fn,
            self.scale_mode,
        )


class OneCycleLR(_Formula):
    """From `max_lr / div_factor` straight up to `max_lr`, then down to `max_lr / final_div_factor`.

    The rise takes the share `pct_start` of the steps and is straight, whatever the strategy;
    `anneal_strategy` is the form of the fall. (`fusedstep.OneCycleLR` has PyTorch's values.)

    Example:
        >>> import fusedstep.braintools as optim
        >>> scheduler = optim.OneCycleLR(max_lr=1.0, total_steps=4, pct_start=0.5)
        >>> rates = []
        >>> for epoch in range(3):
        ...     rates.append(round(scheduler.get_last_lr()[0], 6))
        ...     scheduler.step()
        >>> rates
        [0.04, 0.52, 1.0]
    """

    def __init__(
        self,
        max_lr: float | Sequence[float] = 1e-2,
        total_steps: int | None = None,
        epochs: int | None = None,
        steps_per_epoch: int | None = None,
        pct_start: float = 0.3,
        anneal_strategy: str = "cos",
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
        last_epoch: int = 0,
    ) -> None:
        if total_steps is not None:  # braintools does not look at the other two then
            epochs = steps_per_epoch = None
        checked = OneCycle(
            1.0, total_steps, epochs, steps_per_epoch, pct_start, anneal_strategy, div_factor,
            final_div_factor,
        )  # fmt: skip
        max_lrs = as_rates("max_lr", max_lr)
        self.total_steps, self.pct_start = checked.total_steps, pct_start
        self.anneal_strategy = anneal_strategy
        self.div_factor, self.final_div_factor = div_factor, final_div_factor
        super().__init__([lr / checked.div_factor for lr in max_lrs], last_epoch)

    @property
    def max_lrs(self) -> list[float]:
        """The peaks."""
        return [lr * self.div_factor for lr in self.base_lrs]

    @property
    def min_lrs(self) -> list[float]:
        """The last values."""
        return [lr / self.final_div_factor for lr in self.max_lrs]

    def _schedule(self, group: int) -> schedules.Schedule:
        return OneCycle(
            self.base_lrs[group] * self.div_factor,
            self.total_steps,
            None,
            None,
            self.pct_start,
            self.anneal_strategy,
            self.div_factor,
            self.final_div_factor,
        )
