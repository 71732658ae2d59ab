"""What all schedulers share: an epoch and rates that are brainstate states, one rate per group."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from brainstate.graph import Node

from fusedstep.braintools.values import (
    LEARNING_RATE,
    OptimState,
    as_number,
    is_traced,
    plain,
    show_signature,
)
from fusedstep.ranges import Count, shown

if TYPE_CHECKING:
    from fusedstep.braintools.optimizer import Optimizer

_EPOCH = Count(0)


class LRScheduler(Node):  # type: ignore[misc]
    """A learning rate that depends on the epoch; a scheduler is a subclass with `get_lr`.

    Epochs count from 0. Nothing but `step()` moves on: an optimizer's step only reads. `step()` may
    be called inside of `brainstate.transform.jit` and loops as well; outside, rates are Python
    floats.

    Args:
        base_lr: The learning rate that the formula scales, >= 0, or a list of them: one for each
            param group.
        last_epoch: The epoch to start from, >= 0.

    Attributes:
        base_lrs (list[float]): One rate per group.
        last_epoch (OptimState): How often `step` was called.
        current_lrs (OptimState): The rates now, which the steps of an optimizer read. What is
            assigned holds until the next `step`.
        optimizer: The optimizer that was given this scheduler last, or None.

    Raises:
        TypeError, ValueError: If a constant is no number or out of range; the message names it.

    Example:
        >>> import fusedstep.braintools as optim
        >>> class Halving(optim.LRScheduler):
        ...     def get_lr(self):
        ...         return [lr / 2**self.last_epoch.value for lr in self.base_lrs]
        >>> scheduler = Halving(base_lr=[0.5, 0.25])
        >>> scheduler.step()
        >>> scheduler.get_last_lr()
        [0.25, 0.125]
    """

    graph_invisible_attrs = ("optimizer",)
    optimizer: Optimizer | None = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        show_signature(cls)

    def __init__(self, base_lr: float | Sequence[float] = 1e-3, last_epoch: int = 0) -> None:
        super().__init__()
        self.base_lrs = as_rates("base_lr", base_lr)
        self.last_epoch = OptimState(_EPOCH("last_epoch", last_epoch))
        self.current_lrs = OptimState(list(self.base_lrs))
        try:
            self._refresh()
        except AttributeError as error:
            if error.obj is not self:
                raise
            # A subclass that sets its attributes later: an optimizer that gets it asks again.

    @abstractmethod
    def get_lr(self) -> float | Sequence[float]:
        """The rates of epoch `last_epoch.value`, one per element of `base_lrs`."""

    def step(self, epoch: int | None = None) -> None:
        """Moves on by one epoch, or to the given one."""
        self._move(epoch)
        self._refresh()

    def step_epoch(self) -> None:
        """Moves on by one epoch."""
        self.step()

    def apply(self, apply_fn: Callable[[float], float]) -> None:
        """Changes the rates of this epoch by a function; the next `step` computes them anew."""
        self.current_lrs.value = [apply_fn(lr) for lr in self._lrs()]

    def get_last_lr(self) -> list[float]:
        """The rates now."""
        return list(self.current_lrs.value)

    def __call__(self, count: Any) -> Any:  # noqa: ARG002
        """Minus the rate of the first group, as a schedule for `optax.scale_by_schedule`."""
        return -self.current_lrs.value[0]

    def attach_optimizer(self, optimizer: Optimizer) -> None:
        """Makes this the scheduler of an optimizer."""
        from fusedstep.braintools.optimizer import Optimizer as Base

        if not isinstance(optimizer, Base):
            raise TypeError(
                f"optimizer: expected one of fusedstep.braintools, got {shown(optimizer)}"
            )
        optimizer.lr_scheduler = self

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on, as plain numbers and lists."""
        return {
            "last_epoch": plain(self.last_epoch.value),
            "base_lrs": list(self.base_lrs),
            "current_lrs": plain(self.current_lrs.value),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on where a scheduler of the same class stood.

        Raises:
            ValueError: If an entry is missing or out of range; nothing has changed then.
        """
        last_epoch, base_lrs, current_lrs = self._checked(state_dict)
        self.last_epoch.value, self.base_lrs = last_epoch, base_lrs
        self.current_lrs.value = current_lrs

    # --- for the optimizer and for schedulers that consist of others ----------------------------

    def add_group(self, base_lr: float | None) -> int:
        """Adds the rate of a further param group; None: that of the last one. Returns its place."""
        self.base_lrs = [*self.base_lrs, self.base_lrs[-1] if base_lr is None else base_lr]
        self.current_lrs.value = [*self.current_lrs.value, self._lrs()[-1]]
        return len(self.base_lrs) - 1

    def _lrs(self) -> list[float]:
        lrs = self.get_lr()
        return list(lrs) if isinstance(lrs, (list, tuple)) else [lrs]  # type: ignore[list-item]

    def _move(self, epoch: Any) -> None:
        if epoch is None:
            epoch = plain(self.last_epoch.value) + 1  # a number again after compiled steps
        elif not is_traced(epoch):
            epoch = _EPOCH("epoch", as_epoch(epoch))
        self.last_epoch.value = epoch

    def _refresh(self) -> None:
        self.current_lrs.value = self._lrs()

    def _checked(self, state: Mapping[str, Any]) -> tuple[int, list[float], list[float]]:
        missing = [name for name in self.state_dict() if name not in state]
        if missing:
            raise ValueError(f"scheduler: the state has no {', '.join(missing)}")
        try:
            last_epoch = _EPOCH("last_epoch", as_epoch(state["last_epoch"]))
            base_lrs = as_rates("base_lrs", state["base_lrs"])
            current_lrs = as_rates("current_lrs", state["current_lrs"])
        except TypeError as error:
            raise ValueError(f"scheduler: {error}") from error
        if len(current_lrs) != len(base_lrs):
            raise ValueError(
                f"scheduler: {len(base_lrs)} base_lrs, but {len(current_lrs)} current_lrs"
            )
        return last_epoch, base_lrs, current_lrs


def as_rates(name: str, value: Any) -> list[float]:
    """One learning rate or several, as a list of floats."""
    if not isinstance(value, (list, tuple)):
        return [as_number(name, value, LEARNING_RATE)]
    if not value:
        raise ValueError(f"{name}: expected a number or a list of them, got an empty list")
    return [as_number(f"{name}[{k}]", each, LEARNING_RATE) for k, each in enumerate(value)]


def as_epoch(value: Any) -> Any:
    """An epoch that may be an array of one whole number."""
    number = plain(value)
    return int(number) if isinstance(number, float) and number.is_integer() else number
