"""Learning-rate schedules: objects with an epoch counter, each one closed formula of the epoch.

As in braintools and torch, an optimizer's step never moves its schedule; `schedule.step()` does.
The formulas are those of `torch.optim.lr_scheduler` in closed form.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from fusedstep.ranges import Count, Real, shown

_LR = Real(0.0)
_FACTOR = Real(0.0)
_EPOCH = Count(0)
_PLAIN = (bool, int, float, str, list, tuple)


def _like(mine: Any, name: str, value: Any) -> Any:
    """A loaded constant, refused where the schedule's own is of another kind."""
    if isinstance(mine, tuple) and isinstance(value, list):  # JSON knows no tuples
        return tuple(value)
    number = isinstance(mine, (int, float)) and isinstance(value, (int, float))
    if not number and type(mine) is not type(value):
        raise ValueError(f"schedule: {name} is {shown(mine)}, it cannot become {shown(value)}")
    return value


class Schedule(ABC):
    """A learning rate that depends on the epoch. A schedule is a subclass with the formula `at`.

    Args:
        base_lr: The learning rate that the formula scales, >= 0, finite.
        last_epoch: The epoch to start from, >= 0.

    Attributes:
        base_lr (float): As given; assigning to it (or to another constant of the formula) changes
            all later values.
        last_epoch (int): How often `step` was called.

    Raises:
        TypeError, ValueError: If a constant is no number or out of range; the message names it.
    """

    def __init__(self, base_lr: float, last_epoch: int = 0) -> None:
        self.base_lr = _LR.number("base_lr", base_lr)
        self.last_epoch = _EPOCH("last_epoch", last_epoch)
        self._assigned: float | None = None

    @abstractmethod
    def at(self, t: int) -> float:
        """The learning rate of epoch `t` (from 0), whatever the counter says.

        `lr=schedule.at` makes an optimizer that counts by itself: `t` is then the number of steps
        it has applied.
        """

    @property
    def current_lr(self) -> float:
        """The learning rate now, `at(last_epoch)`; what is assigned holds until the next `step`."""
        return self.at(self.last_epoch) if self._assigned is None else self._assigned

    @current_lr.setter
    def current_lr(self, value: float) -> None:
        self._assigned = _LR.number("current_lr", value)

    def step(self, epoch: int | None = None) -> None:
        """Moves on by one epoch, or to the given one."""
        self.last_epoch = self.last_epoch + 1 if epoch is None else _EPOCH("epoch", epoch)
        self._assigned = None

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on: plain numbers, the class as `type`."""
        return {"type": self._type(), **self._constants(), "current_lr": self.current_lr}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where the schedule of the same class stood that `state_dict` was called on.

        Raises:
            ValueError: If the state is of another class, has other entries, or one of them is of
                a wrong kind or out of range; nothing has changed.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"schedule: expected a dict, got {shown(state)}")
        mine = self.state_dict()
        if state.get("type") != mine["type"]:
            raise ValueError(
                f"schedule: expected the state of a {mine['type']}, got {shown(state.get('type'))}"
            )
        if state.keys() != mine.keys():
            raise ValueError(f"schedule: expected the entries {list(mine)}, got {list(state)}")
        try:
            current = _LR.number("current_lr", state["current_lr"])
        except TypeError as error:
            raise ValueError(f"schedule: {error}") from error
        loaded = {name: _like(mine[name], name, state[name]) for name in self._constants()}
        self._try(loaded)
        for name, value in loaded.items():
            setattr(self, name, value)
        self._assigned = None if current == self.at(self.last_epoch) else current

    def copied(self) -> Schedule:
        """An independent copy."""
        copied = object.__new__(type(self))
        vars(copied).update(vars(self))
        return copied

    def _try(self, constants: Mapping[str, Any]) -> None:
        """Refuses constants with which no schedule could be made or none has a value now."""
        try:
            _LR.number("base_lr", constants["base_lr"])
            epoch = _EPOCH("last_epoch", constants["last_epoch"])
            if self._constructor_takes(constants):
                type(self)(**constants)
            trial = object.__new__(type(self))
            vars(trial).update({**vars(self), **constants})
            _LR.number(f"at({epoch})", trial.at(epoch))
        except Exception as error:  # `at` is anyone's code
            raise ValueError(f"schedule: {error}") from error

    def _constructor_takes(self, constants: Mapping[str, Any]) -> bool:
        try:
            inspect.signature(type(self)).bind(**constants)
        except TypeError:
            return False
        return True

    def _type(self) -> str:
        return type(self).__name__

    def _constants(self) -> dict[str, Any]:
        """The attributes that are plain data; a function, say, stays with its object."""
        return {
            name: value
            for name, value in vars(self).items()
            if not name.startswith("_") and (value is None or isinstance(value, _PLAIN))
        }

    def __repr__(self) -> str:
        constants = self._constants()
        constants["last_epoch"] = constants.pop("last_epoch")  # what changes comes last
        text = ", ".join(f"{name}={value!r}" for name, value in constants.items())
        return f"{self._type()}({text})"


class ConstantLR(Schedule):
    """`factor * base_lr` for the first `total_iters` epochs, then `base_lr`.

    Args:
        base_lr: Learning rate after the first epochs.
        factor: In [0, 1].
        total_iters: Number of epochs with the factor.
        last_epoch: The epoch to start from.

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
        self.factor = Real(0.0, 1.0, "[]").number("factor", factor)
        self.total_iters = Count(0)("total_iters", total_iters)

    def at(self, t: int) -> float:
        """The learning rate of epoch `t`."""
        return self.base_lr * self.factor if t < self.total_iters else self.base_lr


class StepLR(Schedule):
    """`base_lr`, multiplied by `gamma` after every `step_size` epochs.

    Args:
        base_lr: Learning rate of the first epochs.
        step_size: Number of epochs between two drops, >= 1.
        gamma: Factor of a drop, >= 0.
        last_epoch: The epoch to start from.

    Example:
        >>> schedule = StepLR(base_lr=0.5, step_size=2, gamma=0.5)
        >>> [schedule.at(t) for t in range(5)]
        [0.5, 0.5, 0.25, 0.25, 0.125]

    References:
        torch.optim.lr_scheduler.StepLR, braintools.optim.StepLR.
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
        self.gamma = _FACTOR.number("gamma", gamma)

    def at(self, t: int) -> float:
        """The learning rate of epoch `t`."""
        return self.base_lr * self.gamma ** (t // self.step_size)


class ExponentialLR(Schedule):
    """`base_lr`, multiplied by `gamma` after every epoch.

    Args:
        base_lr: Learning rate of the first epoch.
        gamma: Factor per epoch, >= 0.
        last_epoch: The epoch to start from.

    Example:
        >>> schedule = ExponentialLR(base_lr=0.5, gamma=0.5)
        >>> schedule.step()
        >>> schedule.current_lr, schedule.at(3)
        (0.25, 0.0625)

    References:
        torch.optim.lr_scheduler.ExponentialLR, braintools.optim.ExponentialLR.
    """

    def __init__(self, base_lr: float = 1e-3, gamma: float = 0.95, *, last_epoch: int = 0) -> None:
        super().__init__(base_lr, last_epoch)
        self.gamma = _FACTOR.number("gamma", gamma)

    def at(self, t: int) -> float:
        """The learning rate of epoch `t`."""
        return self.base_lr * self.gamma**t


class MomentumSchedule(ABC):
    """A momentum that depends on the epoch."""

    last_epoch = 0

    def copied(self) -> MomentumSchedule: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    @abstractmethod
    def at(self, t: int) -> float:
        """The momentum of epoch `t`."""

    @property
    def current_momentum(self) -> float:
        """The momentum now."""
        return self.at(self.last_epoch)

    @property
    def next_momentum(self) -> float:
        """The momentum of the next epoch."""
        return self.at(self.last_epoch + 1)
