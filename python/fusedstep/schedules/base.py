"""What all schedules share: a formula of the epoch, a counter, assignment, state."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from fusedstep.ranges import Check, Count, Real, shown

LEARNING_RATE = Real(0.0)
MOMENTUM = Real(0.0, 1.0)
_EPOCH = Count(0)
_SCALARS = (bool, int, float, str)


def _is_plain(value: Any) -> bool:
    """Whether a state dict can hold the value."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, _SCALARS)


def _nested(value: Any) -> tuple[_Curve, ...]:
    """The schedules that an attribute holds."""
    values = value if isinstance(value, (list, tuple)) else (value,)
    return tuple(values) if all(isinstance(each, _Curve) for each in values) else ()


def _copied(value: Any) -> Any:
    """Schedules are copied, wherever they are; functions and whatever else are shared."""
    if isinstance(value, _Curve):
        return value.copied()
    if type(value) in {list, tuple}:
        return type(value)(_copied(each) for each in value)
    return value


def _like(mine: Any, name: str, value: Any, *, optional: bool) -> Any:
    """A loaded constant, refused where the schedule's own is of another kind."""
    if isinstance(value, list) and (isinstance(mine, tuple) or mine is None):
        value = tuple(value)  # JSON knows no tuples
    number = isinstance(mine, (int, float)) and isinstance(value, (int, float))
    # An argument that may be None may be something else: the constructor is asked.
    none = optional and (mine is None or value is None)
    if not number and not none and type(mine) is not type(value):
        raise ValueError(f"schedule: {name} is {shown(mine)}, it cannot become {shown(value)}")
    return value


class _Curve(ABC):
    """A number that depends on the epoch: what learning-rate and momentum schedules are."""

    _RANGE: ClassVar[Real]  # what the number may be
    _CURRENT: ClassVar[str]  # the attribute that is the number now
    _CHECKS: ClassVar[dict[str, Check]] = {"last_epoch": _EPOCH}

    def __init__(self, last_epoch: int = 0) -> None:
        self.last_epoch = _EPOCH("last_epoch", last_epoch)
        self._assigned: float | None = None

    @abstractmethod
    def at(self, t: int) -> float:
        """The value of epoch `t`, whatever the counter says."""

    def _formula(self) -> float:
        """The value now, as long as nothing was assigned."""
        return self.at(self.last_epoch)

    def _now(self) -> float:
        return self._formula() if self._assigned is None else self._assigned

    def _assign(self, value: float) -> None:
        self._assigned = self._RANGE.number(self._CURRENT, value)

    def step(self, epoch: int | None = None) -> None:
        """Moves on by one epoch, or to the given one."""
        self.last_epoch = self.last_epoch + 1 if epoch is None else _EPOCH("epoch", epoch)
        self._assigned = None

    # --- state --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on: plain data, the class as `type`.

        Functions are not in it; schedules that this one consists of are, by their state dicts.
        """
        members = {
            name: [each.state_dict() for each in nested] for name, nested in self._members().items()
        }
        now = getattr(self, self._CURRENT)
        return {"type": self._type(), **self._constants(), **members, self._CURRENT: now}

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
        arguments = inspect.signature(type(self)).parameters
        loaded = {
            name: _like(mine[name], name, state[name], optional=name in arguments)
            for name in self._constants()
        }
        now = self._try(loaded, state)
        for name, value in loaded.items():
            setattr(self, name, value)
        self._load_members(state)
        self._assigned = None if now == self._formula() else now

    def _try(self, loaded: Mapping[str, Any], state: Mapping[str, Any]) -> float:
        """Refuses a state with which no schedule could be made or none has a value now."""
        try:
            now = self._RANGE.number(self._CURRENT, state[self._CURRENT])
            for name, check in self._CHECKS.items():
                if name in loaded:
                    check(name, loaded[name])
            trial = self.copied()
            vars(trial).update(loaded)
            trial._load_members(state)
            trial._make_anew()
            self._RANGE.number(f"at({trial.last_epoch})", trial._formula())
        except Exception as error:  # `at` is anyone's code
            text = str(error).removeprefix("schedule: ")
            raise ValueError(f"schedule: {text}") from error
        return now

    def _load_members(self, state: Mapping[str, Any]) -> None:
        for name, nested in self._members().items():
            saved = state[name]
            if not isinstance(saved, (list, tuple)) or len(saved) != len(nested):
                got = f"{len(saved)} of them" if isinstance(saved, (list, tuple)) else shown(saved)
                raise ValueError(f"{name}: expected the states of {len(nested)}, got {got}")
            for index, (each, its) in enumerate(zip(nested, saved, strict=True)):
                try:
                    each.load_state_dict(its)
                except ValueError as error:
                    text = str(error).removeprefix("schedule: ")
                    raise ValueError(f"{name}[{index}]: {text}") from error

    def _make_anew(self) -> None:
        """Lets the constructor check the constants, if they are what it takes."""
        taken = self._arguments()
        try:
            inspect.signature(type(self)).bind(**taken)
        except TypeError:
            return
        type(self)(**taken)

    def _arguments(self) -> dict[str, Any]:
        """What a schedule like this one is made with."""
        constants, arguments = self._constants(), inspect.signature(type(self)).parameters
        return {n: v for n, v in vars(self).items() if n in constants or n in arguments}

    def _type(self) -> str:
        return type(self).__name__

    def _public(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def _constants(self) -> dict[str, Any]:
        """The attributes that are plain data; a function, say, stays with its object."""
        return {name: value for name, value in self._public().items() if _is_plain(value)}

    def _members(self) -> dict[str, tuple[_Curve, ...]]:
        """The attributes that hold schedules."""
        found = {name: _nested(value) for name, value in self._public().items()}
        return {name: nested for name, nested in found.items() if nested}

    def copied(self) -> Self:
        """A schedule of its own in the same state; one made of others copies those as well."""
        twin = object.__new__(type(self))
        vars(twin).update({name: _copied(value) for name, value in vars(self).items()})
        return twin

    def __repr__(self) -> str:
        constants = {**self._members(), **self._constants()}
        constants["last_epoch"] = constants.pop("last_epoch")  # what changes comes last
        text = ", ".join(f"{name}={value!r}" for name, value in constants.items())
        return f"{self._type()}({text})"


class Schedule(_Curve):
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

    Example:
        >>> class Halving(Schedule):
        ...     def at(self, t):
        ...         return self.base_lr / 2**t
        >>> schedule = Halving(base_lr=0.5)
        >>> schedule.step()
        >>> schedule.current_lr
        0.25
    """

    _RANGE = LEARNING_RATE
    _CURRENT = "current_lr"
    _CHECKS: ClassVar[dict[str, Check]] = {"last_epoch": _EPOCH, "base_lr": LEARNING_RATE}

    def __init__(self, base_lr: float, last_epoch: int = 0) -> None:
        self.base_lr = LEARNING_RATE.number("base_lr", base_lr)
        super().__init__(last_epoch)

    @abstractmethod
    def at(self, t: int) -> float:
        """The learning rate of epoch `t` (from 0), whatever the counter says.

        `lr=schedule.at` makes an optimizer that counts by itself: `t` is then the number of steps
        it has applied. `t` may also be an array, such as a step count that JAX traces; the value is
        then an array of its library.
        """

    @property
    def current_lr(self) -> float:
        """The learning rate now, `at(last_epoch)`; what is assigned holds until the next `step`."""
        return self._now()

    @current_lr.setter
    def current_lr(self, value: float) -> None:
        self._assign(value)


class DerivedSchedule(Schedule):
    """A schedule whose `base_lr` is no constant of its own but follows from the others."""

    def __init__(self, last_epoch: int) -> None:
        _Curve.__init__(self, last_epoch)

    @abstractmethod
    def _base_lr(self) -> float: ...

    @property
    def base_lr(self) -> float:
        """What the schedule starts from; it follows from the constants and cannot be assigned."""
        return self._base_lr()

    @base_lr.setter
    def base_lr(self, value: float) -> None:
        raise AttributeError(
            f"base_lr: that of a {self._type()} follows from its constants, got {shown(value)}"
        )


class MomentumSchedule(_Curve):
    """A momentum that depends on the epoch. A schedule is a subclass with the formula `at`.

    It stands where a momentum does, also for the first of `betas`. Its values lie in [0, 1): with
    1 a velocity would never forget, so 1 is refused.

    Args:
        last_epoch: The epoch (here mostly: the step) to start from, >= 0.

    Attributes:
        last_epoch (int): How often `step` was called.

    Raises:
        TypeError, ValueError: If a constant is no number or out of range; the message names it.

    Example:
        >>> class Rising(MomentumSchedule):
        ...     def at(self, t):
        ...         return 1 - 1 / (t + 2)
        >>> schedule = Rising()
        >>> schedule.step()
        >>> schedule.current_momentum, schedule.next_momentum
        (0.6666666666666667, 0.75)
    """

    _RANGE = MOMENTUM
    _CURRENT = "current_momentum"

    @abstractmethod
    def at(self, t: int) -> float:
        """The momentum of epoch `t` (from 0), whatever the counter says."""

    @property
    def current_momentum(self) -> float:
        """The momentum now, `at(last_epoch)`; what is assigned holds until the next `step`."""
        return self._now()

    @current_momentum.setter
    def current_momentum(self, value: float) -> None:
        self._assign(value)

    @property
    def next_momentum(self) -> float:
        """The momentum of the coming epoch, `at(last_epoch + 1)`: what Nesterov's form looks ahead.

        It does not see what was assigned to `current_momentum`.
        """
        return self.at(self.last_epoch + 1)
