"""Schedules that go up and down: one cycle, or many."""

from __future__ import annotations

import math
from collections.abc import Callable

from fusedstep.ranges import Choice, Count, Flag, Real, shown
from fusedstep.schedules.base import LEARNING_RATE, DerivedSchedule, Schedule
from fusedstep.schedules.shapes import (
    ANNEAL_STRATEGY,
    CYCLE_MODE,
    FRACTION,
    cycle_scale,
    interpolated,
    is_array,
    one_cycle,
    triangle,
)

_DIVISOR = Real(0.0, math.inf, "()")


class OneCycleLR(DerivedSchedule):
    """The 1cycle policy: from `max_lr / div_factor` up to `max_lr`, then far below the start.

    It ends with `max_lr / div_factor / final_div_factor` at step `total_steps - 1` and stays
    there; torch goes beyond it for one step and then raises. `OneCycleMomentum` is what torch does
    to the momentum meanwhile. braintools differs from torch, and from this: a linear rise whatever
    the strategy, and an end at `max_lr / final_div_factor`.

    Args:
        max_lr: The largest learning rate, >= 0.
        total_steps: Number of steps of the cycle, >= 1. Or give both of the next two.
        epochs: Number of epochs, >= 1, and
        steps_per_epoch: of the steps in each, >= 1: then `total_steps` is their product.
        pct_start: Share of the steps that the rise takes, in [0, 1].
        anneal_strategy: "cos" or "linear": the form of rise and fall.
        div_factor: The first value is `max_lr / div_factor`; > 0.
        final_div_factor: The last value is the first one divided by it; > 0.
        three_phase: True falls back to the first value within as many steps as the rise took, and
            only then to the last one (the paper); False falls there at once (fastai).
        last_epoch: The step to start from, >= 0.

    Attributes:
        base_lr (float): The first value, `max_lr / div_factor`. Assign to `max_lr` instead.

    Example:
        >>> schedule = OneCycleLR(max_lr=1.0, total_steps=10, anneal_strategy="linear")
        >>> [round(schedule.at(t), 3) for t in (0, 1, 2, 6, 9, 20)]
        [0.04, 0.52, 1.0, 0.429, 0.0, 0.0]

    References:
        Smith and Topin (2018), Super-convergence: very fast training of neural networks using
        large learning rates, arXiv:1708.07120; torch.optim.lr_scheduler.OneCycleLR.
    """

    def __init__(
        self,
        max_lr: float,
        total_steps: int | None = None,
        epochs: int | None = None,
        steps_per_epoch: int | None = None,
        pct_start: float = 0.3,
        anneal_strategy: str = "cos",
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
        three_phase: bool = False,
        *,
        last_epoch: int = 0,
    ) -> None:
        super().__init__(last_epoch)
        self.max_lr = LEARNING_RATE.number("max_lr", max_lr)
        self.total_steps = _total_steps(total_steps, epochs, steps_per_epoch)
        self.pct_start = FRACTION.number("pct_start", pct_start)
        self.anneal_strategy = ANNEAL_STRATEGY("anneal_strategy", anneal_strategy)
        self.div_factor = _DIVISOR.number("div_factor", div_factor)
        self.final_div_factor = _DIVISOR.number("final_div_factor", final_div_factor)
        self.three_phase = Flag()("three_phase", three_phase)

    def _base_lr(self) -> float:
        return self.max_lr / self.div_factor

    def at(self, t: int) -> float:
        """The learning rate of step `t`."""
        first = self.base_lr
        last = first / self.final_div_factor
        up = (first, self.max_lr, first) if self.three_phase else (first, self.max_lr)
        return one_cycle(t, (*up, last), self.total_steps, self.pct_start, self.anneal_strategy)


def _total_steps(total_steps: int | None, epochs: int | None, steps_per_epoch: int | None) -> int:
    if total_steps is None:
        if epochs is None or steps_per_epoch is None:
            raise TypeError("total_steps: expected it, or both epochs and steps_per_epoch")
        return Count(1)("epochs", epochs) * Count(1)("steps_per_epoch", steps_per_epoch)
    if epochs is not None or steps_per_epoch is not None:
        raise TypeError(
            f"total_steps: expected it, or epochs and steps_per_epoch; got {shown(total_steps)} "
            f"beside epochs={shown(epochs)}, steps_per_epoch={shown(steps_per_epoch)}"
        )
    return Count(1)("total_steps", total_steps)


class CyclicLR(Schedule):
    """Straight from `base_lr` to `max_lr` and back, in cycles of the same length.

    With unequal halves braintools' values are wrong (it measures both by `step_size_up`); these
    are torch's. `CyclicMomentum` is what torch does to the momentum meanwhile.

    Args:
        base_lr: Learning rate at the borders of the cycles, >= 0.
        max_lr: Learning rate at the first peak, >= 0.
        step_size_up: Number of steps up, >= 1.
        step_size_down: Number of steps down, >= 0; None: as many as up. With 0, a saw.
        mode: "triangular": all cycles alike; "triangular2": each half as high as the one before;
            "exp_range": the height shrinks by `gamma` at every step.
        gamma: For "exp_range", in [0, 1].
        scale_fn: Instead of a mode: a function that gives the height, in [0, 1], of
        scale_mode: the cycle, counted from 1 ("cycle"), or of the step ("iterations"). Neither it
            nor a mode beside it matters without `scale_fn`; functions are not in the state.
        last_epoch: The step to start from, >= 0.

    Example:
        >>> schedule = CyclicLR(base_lr=0.5, max_lr=1.0, step_size_up=2, mode="triangular2")
        >>> [schedule.at(t) for t in range(9)]
        [0.5, 0.75, 1.0, 0.75, 0.5, 0.625, 0.75, 0.625, 0.5]

    References:
        Smith (2017), Cyclical learning rates for training neural networks, arXiv:1506.01186;
        torch.optim.lr_scheduler.CyclicLR.
    """

    def __init__(
        self,
        base_lr: float = 1e-3,
        max_lr: float = 1e-2,
        step_size_up: int = 2000,
        step_size_down: int | None = None,
        mode: str = "triangular",
        gamma: float = 1.0,
        scale_fn: Callable[[int], float] | None = None,
        scale_mode: str = "cycle",
        *,
        last_epoch: int = 0,
    ) -> None:
        super().__init__(base_lr, last_epoch)
        self.max_lr = LEARNING_RATE.number("max_lr", max_lr)
        self.step_size_up = Count(1)("step_size_up", step_size_up)
        down = self.step_size_up if step_size_down is None else step_size_down
        self.step_size_down = Count(0)("step_size_down", down)
        self.mode = CYCLE_MODE("mode", mode)
        self.gamma = FRACTION.number("gamma", gamma)
        if scale_fn is not None and not callable(scale_fn):
            raise TypeError(f"scale_fn: expected a function or None, got {shown(scale_fn)}")
        self.scale_fn = scale_fn
        self.scale_mode = Choice("cycle", "iterations")("scale_mode", scale_mode)

    def at(self, t: int) -> float:
        """The learning rate of step `t`."""
        cycle, height = triangle(t, self.step_size_up, self.step_size_down)
        return interpolated(self.base_lr, self.max_lr, height * self._scale(t, cycle))

    def _scale(self, t: int, cycle: int) -> float:
        if self.scale_fn is None:
            return cycle_scale(t, cycle, self.mode, self.gamma)
        x = cycle if self.scale_mode == "cycle" else t
        scale = self.scale_fn(x)
        return scale if is_array(scale) else FRACTION.number(f"scale_fn({x})", scale)
