"""The schedule that follows a measurement instead of the epoch."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple, SupportsFloat

from fusedstep.ranges import Check, Choice, Count, Real, shown
from fusedstep.schedules.base import LEARNING_RATE, Schedule
from fusedstep.schedules.shapes import larger, select


class Counters(NamedTuple):
    """What a plateau schedule remembers from epoch to epoch."""

    best: float
    num_bad_epochs: int
    cooldown_counter: int


class ReduceLROnPlateau(Schedule):
    """The learning rate, reduced whenever a metric has stopped improving. It has no formula.

    `step(metric)` after each epoch's validation: if more than `patience` epochs in a row brought
    nothing better, the rate is multiplied by `factor`, and for `cooldown` epochs bad ones do not
    count. A metric is better if it is below `best * (1 - threshold)` ("rel"; for `mode="max"`,
    above `best * (1 + threshold)`) or beyond `best` by more than `threshold` ("abs"). NaN is never
    better. "rel" supposes a metric > 0, as in torch. `best` is kept up to date also in the
    cooldown (torch; braintools does not).

    Args:
        base_lr: Learning rate until the first reduction, >= 0.
        mode: "min" or "max": which metric is better.
        factor: Factor of a reduction, in [0, 1).
        patience: Number of bad epochs that are borne with, >= 0.
        threshold: How much better is better, >= 0.
        threshold_mode: "rel" or "abs".
        cooldown: Number of epochs after a reduction in which bad ones do not count, >= 0.
        min_lr: The rate is not reduced below it, >= 0.
        eps: A reduction by no more than this is left out, >= 0.
        last_epoch: What the counter starts from, >= 0.

    Attributes:
        best (float): The best metric so far.
        num_bad_epochs (int): How many epochs in a row brought nothing better.
        cooldown_counter (int): How many epochs of the cooldown are left.

    Example:
        >>> schedule = ReduceLROnPlateau(base_lr=0.5, factor=0.5, patience=1)
        >>> for loss in (3.0, 2.0, 2.0, 2.0):
        ...     schedule.step(loss)
        >>> schedule.current_lr, schedule.best
        (0.25, 2.0)

    References:
        torch.optim.lr_scheduler.ReduceLROnPlateau, braintools.optim.ReduceLROnPlateau (which
        has an `eps` but does not use it).
    """

    _CHECKS: ClassVar[dict[str, Check]] = {
        **Schedule._CHECKS,
        "best": Real(-math.inf, math.inf, "[]"),
        "num_bad_epochs": Count(0),
        "cooldown_counter": Count(0),
    }

    def __init__(
        self,
        base_lr: float = 1e-3,
        mode: str = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: str = "rel",
        cooldown: int = 0,
        min_lr: float = 0.0,
        eps: float = 1e-8,
        *,
        last_epoch: int = 0,
    ) -> None:
        super().__init__(base_lr, last_epoch)
        self.mode = Choice("min", "max")("mode", mode)
        self.factor = Real(0.0, 1.0).number("factor", factor)
        self.patience = Count(0)("patience", patience)
        self.threshold = Real(0.0).number("threshold", threshold)
        self.threshold_mode = Choice("rel", "abs")("threshold_mode", threshold_mode)
        self.cooldown = Count(0)("cooldown", cooldown)
        self.min_lr = LEARNING_RATE.number("min_lr", min_lr)
        self.eps = Real(0.0).number("eps", eps)
        self.best = math.inf if self.mode == "min" else -math.inf
        self.num_bad_epochs = 0
        self.cooldown_counter = 0

    def at(self, t: int) -> float:
        """There is no such value: TypeError."""
        raise TypeError(
            f"at({shown(t)}): a ReduceLROnPlateau follows a metric and has no value at a given "
            "epoch; pass the schedule itself as lr, and call step(metric)"
        )

    def _formula(self) -> float:
        return self.base_lr  # until a reduction is assigned

    def step(self, metric: SupportsFloat) -> None:  # type: ignore[override]
        """Moves on by one epoch that ended with the metric: a number, or an array of one."""
        value = _number(metric)
        self.last_epoch += 1
        counters = Counters(self.best, self.num_bad_epochs, self.cooldown_counter)
        (self.best, self.num_bad_epochs, self.cooldown_counter), reduces = self._judged(
            value, counters
        )
        old = self.current_lr
        new = self._reduced(old) if reduces else old
        if new != old:
            self.current_lr = new

    def _judged(self, metric: float, counters: Counters) -> tuple[Counters, bool]:
        """The counters after an epoch, and whether the rate is to be reduced; see `shapes`."""
        best, bad, cooldown = counters
        better, cools = self._is_better(metric, best), cooldown > 0
        best = self._best(best, select(better, metric, best), cools)
        bad = select(cools, 0, select(better, 0, bad + 1))
        reduces = bad > self.patience
        bad = select(reduces, 0, bad)
        cooldown = select(reduces, self.cooldown, select(cools, cooldown - 1, 0))
        return Counters(best, bad, cooldown), reduces

    def _best(self, old: float, new: float, cools: bool) -> float:  # noqa: ARG002
        """What is the best metric after this epoch, in which a cooldown may be under way."""
        return new

    def _is_better(self, value: float, best: float) -> bool:
        sign = 1.0 if self.mode == "max" else -1.0
        if self.threshold_mode == "rel":
            limit = best * (1.0 + sign * self.threshold)
        else:
            limit = best + sign * self.threshold
        return value > limit if self.mode == "max" else value < limit

    def _reduced(self, lr: float) -> float:
        new = larger(lr * self.factor, self.min_lr)
        return select(lr - new > self.eps, new, lr)

    def _arguments(self) -> dict[str, Any]:
        counters = {"best", "num_bad_epochs", "cooldown_counter"}
        return {n: v for n, v in super()._arguments().items() if n not in counters}


def _number(metric: Any) -> float:
    if not isinstance(metric, (str, bytes, bool)):
        try:
            return float(metric)
        except (TypeError, ValueError):
            pass
    raise TypeError(f"metric: expected a number, got {shown(metric)}")
