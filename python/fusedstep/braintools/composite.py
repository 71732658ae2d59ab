"""Schedulers that consist of others, and the one that follows a measurement."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from fusedstep.braintools.scheduler import LRScheduler, as_epoch, as_rates
from fusedstep.braintools.values import OptimState, is_traced, plain
from fusedstep.braintools.variants import Plateau
from fusedstep.ranges import Count, shown
from fusedstep.schedules.plateau import Counters
from fusedstep.schedules.shapes import choose, increasing, larger, passed, select


class _Composite(LRScheduler):
    """A scheduler that moves others, and makes its rates of theirs."""

    schedulers: list[LRScheduler]

    def _set_members(self, schedulers: Sequence[LRScheduler]) -> None:
        if not isinstance(schedulers, (list, tuple)) or not schedulers:
            raise ValueError(
                f"schedulers: expected a list of at least one, got {shown(schedulers)}"
            )
        for index, scheduler in enumerate(schedulers):
            if not isinstance(scheduler, LRScheduler):
                raise TypeError(
                    f"schedulers[{index}]: expected a scheduler of fusedstep.braintools, got "
                    f"{shown(scheduler)}"
                )
            if isinstance(scheduler, ReduceLROnPlateau):
                raise TypeError(
                    f"schedulers[{index}]: a ReduceLROnPlateau follows a metric, not the epoch"
                )
        self.schedulers = list(schedulers)

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on, that of the members included."""
        return {**super().state_dict(), "schedulers": [s.state_dict() for s in self.schedulers]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on where a scheduler of the same class stood, and its members, too."""
        self._checked(state_dict)
        for scheduler, state in zip(self.schedulers, state_dict["schedulers"], strict=True):
            scheduler.load_state_dict(state)
        super().load_state_dict(state_dict)

    def _checked(self, state: Mapping[str, Any]) -> tuple[int, list[float], list[float]]:
        found = super()._checked(state)
        members = state["schedulers"]
        if not isinstance(members, (list, tuple)) or len(members) != len(self.schedulers):
            raise ValueError(f"scheduler: expected the states of {len(self.schedulers)} schedulers")
        for scheduler, own in zip(self.schedulers, members, strict=True):
            scheduler._checked(own)
        return found


class ChainedScheduler(_Composite):
    """The rates of the first scheduler's `base_lr`, times the factors of all schedulers.

    A factor is a scheduler's rate over its own `base_lr`. `step()` moves all of them.
    """

    def __init__(self, schedulers: Sequence[LRScheduler]) -> None:
        self._set_members(schedulers)
        super().__init__(schedulers[0].base_lrs)

    def step(self, epoch: int | None = None) -> None:
        """Moves all schedulers on by one epoch, or to the given one."""
        for scheduler in self.schedulers:
            scheduler.step(epoch)
        super().step(epoch)

    def get_lr(self) -> list[float]:
        """The rates of this epoch, one per element of `base_lrs`."""
        factors = [
            math.prod(_factor(scheduler, group) for scheduler in self.schedulers)
            for group in range(len(self.base_lrs))
        ]
        return [base * factor for base, factor in zip(self.base_lrs, factors, strict=True)]


def _factor(scheduler: LRScheduler, group: int) -> float:
    """By what a scheduler multiplies the rate of a group; of a `base_lr` of 0, by 0."""
    lrs = scheduler._lrs()
    group = min(group, len(lrs) - 1)
    base = scheduler.base_lrs[group]
    return lrs[group] / base if base else 0.0


class SequentialLR(_Composite):
    """One scheduler after the other; each begins with its epoch 0 at its milestone.

    Args:
        schedulers: At least one. Each has its own `base_lr`. They are moved to their epochs by
            this one, all of them at each step.
        milestones: The first epochs of the second, third, ... scheduler: increasing, >= 1, one
            fewer than schedulers.
        last_epoch: The epoch to start from, >= 0.
    """

    def __init__(
        self, schedulers: Sequence[LRScheduler], milestones: Sequence[int], last_epoch: int = 0
    ) -> None:
        self._set_members(schedulers)
        for index, scheduler in enumerate(schedulers):
            if len(scheduler.base_lrs) not in {1, len(schedulers[0].base_lrs)}:
                raise ValueError(
                    f"schedulers[{index}]: expected one base_lr or as many as the first one has, "
                    f"{len(schedulers[0].base_lrs)}, got {len(scheduler.base_lrs)}"
                )
        self.milestones = increasing("milestones", milestones, low=1)
        if len(self.milestones) != len(schedulers) - 1:
            raise ValueError(
                f"milestones: expected {len(schedulers) - 1}, one fewer than schedulers, got "
                f"{len(self.milestones)}"
            )
        super().__init__(schedulers[0].base_lrs, last_epoch)
        self._move_members()
        self._refresh()

    def add_group(self, base_lr: float | None) -> int:
        """Adds a further param group's rate, to the members in the proportion of their rates."""
        for scheduler in self.schedulers:
            while len(scheduler.base_lrs) < len(self.base_lrs):
                scheduler.add_group(None)
            ratio = scheduler.base_lrs[0] / self.base_lrs[0] if self.base_lrs[0] else 1.0
            scheduler.add_group(None if base_lr is None else base_lr * ratio)
        return super().add_group(base_lr)

    @property
    def current_scheduler_idx(self) -> int:
        """Which of the schedulers the rates come from now."""
        return passed(self.milestones, self.last_epoch.value)

    def step(self, epoch: int | None = None) -> None:
        """Moves on by one epoch, or to the given one."""
        self._move(epoch)
        self._move_members()
        self._refresh()

    def _move_members(self) -> None:
        for scheduler, begin in zip(self.schedulers, (0, *self.milestones), strict=True):
            scheduler.step(larger(self.last_epoch.value - begin, 0))

    def get_lr(self) -> list[float]:
        """The rates of this epoch, one per element of `base_lrs`."""
        members = [scheduler._lrs() for scheduler in self.schedulers]
        return [
            choose(self.current_scheduler_idx, [partial(_of_group, lrs, k) for lrs in members])
            for k in range(len(self.base_lrs))
        ]


def _of_group(lrs: list[float], group: int) -> float:
    """The rate of a group; further groups than a scheduler has rates for have its last one."""
    return lrs[min(group, len(lrs) - 1)]


class ReduceLROnPlateau(LRScheduler):
    """The learning rate, reduced whenever a metric has stopped improving.

    `step(metric)` after each epoch's validation; see `fusedstep.ReduceLROnPlateau` for the rule.
    As in braintools, what happens in a cooldown leaves `best` alone. `eps` is respected, which
    braintools has, but does not use.

    Args:
        base_lr: Learning rate until the first reduction, or a list of them, >= 0.
        mode: "min" or "max": which metric is better.
        factor: Factor of a reduction, in [0, 1).
        patience: Number of bad epochs that are borne with, >= 0.
        threshold: How much better is better, >= 0.
        threshold_mode: "rel" or "abs".
        cooldown: Number of epochs after a reduction that do not count, >= 0.
        min_lr: The rate is not reduced below it, >= 0; or a list, one per group.
        eps: A reduction by no more than this is left out, >= 0.
        last_epoch: What the counter starts from, >= 0.

    Attributes:
        best, num_bad_epochs, cooldown_counter (OptimState): What the rule remembers.
    """

    def __init__(
        self,
        base_lr: float | Sequence[float] = 1e-3,
        mode: str = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: str = "rel",
        cooldown: int = 0,
        min_lr: float | Sequence[float] = 0.0,
        eps: float = 1e-8,
        last_epoch: int = 0,
    ) -> None:
        self.mode, self.factor, self.patience = mode, factor, patience
        self.threshold, self.threshold_mode = threshold, threshold_mode
        self.cooldown, self.eps = cooldown, eps
        self.min_lrs = as_rates("min_lr", min_lr)
        self.best = OptimState(self._rule(0).best)
        self.num_bad_epochs, self.cooldown_counter = OptimState(0), OptimState(0)
        super().__init__(base_lr, last_epoch)

    def _rule(self, group: int) -> Plateau:
        return Plateau(
            mode=self.mode,
            factor=self.factor,
            patience=self.patience,
            threshold=self.threshold,
            threshold_mode=self.threshold_mode,
            cooldown=self.cooldown,
            min_lr=_of_group(self.min_lrs, group),
            eps=self.eps,
        )

    def _counters(self) -> tuple[OptimState, OptimState, OptimState]:
        return self.best, self.num_bad_epochs, self.cooldown_counter

    def step(self, metric: Any, epoch: int | None = None) -> None:  # type: ignore[override]
        """Moves on by one epoch that ended with the metric: a number, or an array of one."""
        value = metric if is_traced(metric) else as_metric("metric", metric)
        before = Counters(*(plain(state.value) for state in self._counters()))
        after, reduces = self._rule(0)._judged(value, before)
        self._move(epoch)
        for state, number in zip(self._counters(), after, strict=True):
            state.value = number
        self.current_lrs.value = [
            select(reduces, self._rule(group)._reduced(lr), lr)
            for group, lr in enumerate(self.current_lrs.value)
        ]

    def get_lr(self) -> list[float]:
        """The rates now: there is no formula."""
        return list(self.current_lrs.value)

    def add_group(self, base_lr: float | None) -> int:
        """Adds the rate of a further param group; None: that of the last one. Returns its place."""
        place = super().add_group(base_lr)
        lrs = self.current_lrs.value
        self.current_lrs.value = [*lrs[:place], lrs[-1] if base_lr is None else base_lr]
        return place

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on."""
        names = ("best", "num_bad_epochs", "cooldown_counter")
        counters = {name: plain(getattr(self, name).value) for name in names}
        return {**super().state_dict(), **counters}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on where a scheduler of the same class stood."""
        last_epoch, base_lrs, current_lrs = self._checked(state_dict)
        best = as_metric("best", state_dict["best"])
        bad, cooldown = (
            Count(0)(name, as_epoch(state_dict[name]))
            for name in ("num_bad_epochs", "cooldown_counter")
        )
        self.base_lrs, self.last_epoch.value = base_lrs, last_epoch
        self.current_lrs.value = current_lrs
        self.best.value, self.num_bad_epochs.value = best, bad
        self.cooldown_counter.value = cooldown


def as_metric(name: str, value: Any) -> float:
    """A number, or an array of one."""
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {shown(value)}")
    return float(number)
