"""Momentum schedules."""

from __future__ import annotations

import math
from array import array
from threading import Lock

from fusedstep.ranges import Count, Flag, Real
from fusedstep.schedules.base import MOMENTUM, MomentumSchedule
from fusedstep.schedules.shapes import (
    ANNEAL_STRATEGY,
    CYCLE_MODE,
    FRACTION,
    cycle_scale,
    interpolated,
    is_array,
    one_cycle,
    select,
    smaller,
    triangle,
)


class SutskeverMomentum(MomentumSchedule):
    """`min(1 - 2 ** (-1 - log2(t // period + 1)), max_momentum)`: 0.5, 0.75, 0.833, 0.875, ...

    It is computed as `1 - 1 / (2 (t // period + 1))`, which is the same number without logarithm.

    Args:
        max_momentum: Upper limit, in [0, 1); the paper tried 0.9, 0.99, 0.995, 0.999 and 0.
        period: Number of steps between two rises, >= 1.
        last_epoch: The step to start from, >= 0.

    Example:
        >>> schedule = SutskeverMomentum(max_momentum=0.85, period=250)
        >>> [round(schedule.at(t), 4) for t in (0, 249, 250, 500, 750)]
        [0.5, 0.5, 0.75, 0.8333, 0.85]

    References:
        Sutskever, Martens, Dahl and Hinton (2013), On the importance of initialization and
        momentum in deep learning, section 3.
    """

    def __init__(
        self, max_momentum: float = 0.99, period: int = 250, *, last_epoch: int = 0
    ) -> None:
        super().__init__(last_epoch)
        self.max_momentum = MOMENTUM.number("max_momentum", max_momentum)
        self.period = Count(1)("period", period)

    def at(self, t: int) -> float:
        """The momentum of step `t`."""
        return smaller(1.0 - 1.0 / (2 * (t // self.period + 1)), self.max_momentum)


class NesterovMomentum(MomentumSchedule):
    r"""Nesterov's own sequence, with which his method (FISTA) has its rate O(1/t^2).

    .. math::
        \mu_t = (a_{t-1} - 1) / a_t, \quad a_0 = 1, \quad a_{k+1} = (1 + \sqrt{1 + 4 a_k^2}) / 2

    `at(t)` is the factor of the velocity that `t` steps have made: 0 after none and after one,
    then 0.282, 0.434, 0.531, ..., nearly `1 - 3 / (t + 2)`. With it as momentum and `at(t + 1)`
    as next momentum, `MomentumNesterov` *is* Nesterov's method. (Papers that write
    `mu_t = (a_t - 1) / a_{t+1}` pair it with the velocity of step t + 1.)

    Args:
        r: None: the recursion above. A number >= 3: `(t - 1) / (t - 1 + r)` instead, without
            recursion; 3 has the same rate, with more than 3 the iterates converge, too.
        last_epoch: The step to start from, >= 0.

    Example:
        >>> schedule = NesterovMomentum()
        >>> [round(schedule.at(t), 4) for t in range(5)]
        [0.0, 0.0, 0.2818, 0.434, 0.5311]
        >>> [NesterovMomentum(r=3).at(t) for t in range(5)]
        [0.0, 0.0, 0.25, 0.4, 0.5]

    References:
        Nesterov (1983), A method of solving a convex programming problem with convergence rate
        O(1/k^2); Beck and Teboulle (2009), A fast iterative shrinkage-thresholding algorithm;
        Su, Boyd and Candes (2014), A differential equation for modeling Nesterov's accelerated
        gradient method, arXiv:1503.01243; Chambolle and Dossal (2015), On the convergence of the
        iterates of FISTA.
    """

    def __init__(self, r: float | None = None, *, last_epoch: int = 0) -> None:
        super().__init__(last_epoch)
        self.r = Real(3.0, optional=True)("r", r)

    def at(self, t: int) -> float:
        """The momentum of step `t`."""
        if self.r is not None:
            return select(t == 0, 0.0, (t - 1) / (t - 1 + self.r))
        if is_array(t):
            raise TypeError(
                "at: without r the sequence has no closed form, and so no value at a step that is "
                "an array; with r=3 it is nearly the same"
            )
        if t == 0:
            return 0.0
        a = _nesterov_a(t - 1)
        return (a - 1.0) / _after(a)


def _after(a: float) -> float:
    return (1.0 + math.sqrt(1.0 + 4.0 * a * a)) / 2.0


_SPACING = 64
_FAR = 2**20
_marks = array("d", [1.0])  # a_0, a_64, a_128, ...: what has been computed of the sequence
_marks_lock = Lock()


def _nesterov_a(k: int) -> float:
    """a_k, from the mark before it in less than `_SPACING` steps."""
    if k > _FAR:
        return _far_a(k)
    mark, rest = divmod(k, _SPACING)
    if mark >= len(_marks):
        with _marks_lock:
            while mark >= len(_marks):
                a = _marks[-1]
                for _ in range(_SPACING):
                    a = _after(a)
                _marks.append(a)
    a = _marks[mark]
    for _ in range(rest):
        a = _after(a)
    return a


def _far_a(k: int) -> float:
    """a_k for k > `_FAR`: a - log(a) / 4 grows by 1/2 at every step, but for O(1 / a^3)."""
    start = _nesterov_a(_FAR)
    target = start - math.log(start) / 4.0 + (k - _FAR) / 2.0
    a = target
    for _ in range(4):  # each time the error shrinks by 4 a > 10^6
        a = target + math.log(a) / 4.0
    return a


class OneCycleMomentum(MomentumSchedule):
    """What torch's OneCycleLR does to the momentum (or beta1) while the learning rate cycles.

    It falls from `max_momentum` to `base_momentum` as the rate rises, rises again as the rate
    falls, and stays. Give it and `OneCycleLR` the same steps, share, strategy and phases.

    Args:
        total_steps: Number of steps of the cycle, >= 1.
        base_momentum: Momentum where the learning rate is largest, in [0, 1).
        max_momentum: Momentum at both ends, in [0, 1).
        pct_start: Share of the steps that the rise of the learning rate takes, in [0, 1].
        anneal_strategy: "cos" or "linear".
        three_phase: True is back at `max_momentum` after twice the rise, False only at the end.
        last_epoch: The step to start from, >= 0.

    Example:
        >>> schedule = OneCycleMomentum(total_steps=10, anneal_strategy="linear")
        >>> [round(schedule.at(t), 3) for t in (0, 1, 2, 6, 9, 20)]
        [0.95, 0.9, 0.85, 0.907, 0.95, 0.95]

    References:
        Smith (2018), A disciplined approach to neural network hyper-parameters,
        arXiv:1803.09820; torch.optim.lr_scheduler.OneCycleLR(cycle_momentum=True).
    """

    def __init__(
        self,
        total_steps: int,
        base_momentum: float = 0.85,
        max_momentum: float = 0.95,
        pct_start: float = 0.3,
        anneal_strategy: str = "cos",
        three_phase: bool = False,
        *,
        last_epoch: int = 0,
    ) -> None:
        super().__init__(last_epoch)
        self.total_steps = Count(1)("total_steps", total_steps)
        self.base_momentum = MOMENTUM.number("base_momentum", base_momentum)
        self.max_momentum = MOMENTUM.number("max_momentum", max_momentum)
        self.pct_start = FRACTION.number("pct_start", pct_start)
        self.anneal_strategy = ANNEAL_STRATEGY("anneal_strategy", anneal_strategy)
        self.three_phase = Flag()("three_phase", three_phase)

    def at(self, t: int) -> float:
        """The momentum of step `t`."""
        low, high = self.base_momentum, self.max_momentum
        phases = (high, low, high, high) if self.three_phase else (high, low, high)
        return one_cycle(t, phases, self.total_steps, self.pct_start, self.anneal_strategy)


class CyclicMomentum(MomentumSchedule):
    """What torch's CyclicLR does to the momentum (or beta1) while the learning rate cycles.

    Straight from `max_momentum` to `base_momentum` and back. Give it and `CyclicLR` the same
    step sizes, mode and gamma.

    Args:
        base_momentum: Momentum where the learning rate is largest, in [0, 1).
        max_momentum: Momentum at the borders of the cycles, in [0, 1).
        step_size_up: Number of steps in which the learning rate rises, >= 1.
        step_size_down: Number of steps in which it falls, >= 0; None: as many.
        mode: "triangular", "triangular2" or "exp_range", as of `CyclicLR`.
        gamma: For "exp_range", in [0, 1].
        last_epoch: The step to start from, >= 0.

    Example:
        >>> schedule = CyclicMomentum(base_momentum=0.5, max_momentum=0.75, step_size_up=2)
        >>> [schedule.at(t) for t in range(6)]
        [0.75, 0.625, 0.5, 0.625, 0.75, 0.625]

    References:
        torch.optim.lr_scheduler.CyclicLR(cycle_momentum=True).
    """

    def __init__(
        self,
        base_momentum: float = 0.8,
        max_momentum: float = 0.9,
        step_size_up: int = 2000,
        step_size_down: int | None = None,
        mode: str = "triangular",
        gamma: float = 1.0,
        *,
        last_epoch: int = 0,
    ) -> None:
        super().__init__(last_epoch)
        self.base_momentum = MOMENTUM.number("base_momentum", base_momentum)
        self.max_momentum = MOMENTUM.number("max_momentum", max_momentum)
        self.step_size_up = Count(1)("step_size_up", step_size_up)
        down = self.step_size_up if step_size_down is None else step_size_down
        self.step_size_down = Count(0)("step_size_down", down)
        self.mode = CYCLE_MODE("mode", mode)
        self.gamma = FRACTION.number("gamma", gamma)

    def at(self, t: int) -> float:
        """The momentum of step `t`."""
        cycle, height = triangle(t, self.step_size_up, self.step_size_down)
        share = height * cycle_scale(t, cycle, self.mode, self.gamma)
        return interpolated(self.max_momentum, self.base_momentum, share)


class LinearMomentum(MomentumSchedule):
    """Straight from `start` to `end` within `total_iters` steps, and stays: "0.5, anneal to 0.99".

    Args:
        start: Momentum of the first step, in [0, 1).
        end: Momentum from step `total_iters` on, in [0, 1).
        total_iters: Number of steps in between, >= 1.
        last_epoch: The step to start from, >= 0.

    Example:
        >>> schedule = LinearMomentum(start=0.5, end=0.75, total_iters=2)
        >>> [schedule.at(t) for t in range(4)]
        [0.5, 0.625, 0.75, 0.75]

    References:
        Hinton (2012), A practical guide to training restricted Boltzmann machines, section 9:
        begin with 0.5, and raise it once the large gradients are over.
    """

    def __init__(
        self,
        start: float = 0.5,
        end: float = 0.99,
        total_iters: int = 1000,
        *,
        last_epoch: int = 0,
    ) -> None:
        super().__init__(last_epoch)
        self.start = MOMENTUM.number("start", start)
        self.end = MOMENTUM.number("end", end)
        self.total_iters = Count(1)("total_iters", total_iters)

    def at(self, t: int) -> float:
        """The momentum of step `t`."""
        return interpolated(self.start, self.end, t / self.total_iters)
