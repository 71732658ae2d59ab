"""What all optimizers share: weights that are brainstate states, groups, one compiled step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from brainstate.graph import Node

from fusedstep.braintools import checkpoint
from fusedstep.braintools.formulas import ConstantLR
from fusedstep.braintools.scheduler import LRScheduler
from fusedstep.braintools.values import (
    LEARNING_RATE,
    OptimState,
    as_number,
    is_traced,
    show_signature,
)
from fusedstep.braintools.weights import Tree, Weight, gradient_at, weights_in
from fusedstep.codegen import CALL_WIDE
from fusedstep.hyperparameters import weight_decay_range
from fusedstep.jax.calls import Measured
from fusedstep.jax.sharding import axes_of, measure
from fusedstep.jax.state import State
from fusedstep.jax.transform import Transform
from fusedstep.jax.trees import gradients_of, leaves_of
from fusedstep.ranges import shown

Trees = list[dict[str, Tree]]
"""For each group, a tree per weight."""


@dataclass(frozen=True)
class Group:
    """Weights with the same hyper-parameters; a leaf of brainstate's graphs."""

    paths: tuple[tuple[str, Any], ...]  # of each weight: its name, and where its gradient is
    transform: Transform
    given: tuple[tuple[str, Any], ...]  # its own hyper-parameters
    lr: float | None  # the rate that `add_param_group` was given
    place: int  # of its rate in the scheduler

    @property
    def weight_decay(self) -> float:
        """The decay that was given."""
        return float(dict(self.given)["weight_decay"])


class GroupLR:
    """The learning rate of a group, live: `.value` reads and writes the scheduler's."""

    def __init__(self, optimizer: Optimizer, group: int) -> None:
        self._optimizer = optimizer
        self._group = group

    def __repr__(self) -> str:
        return f"<the learning rate of group {self._group}: {self.value}>"

    @property
    def value(self) -> Any:
        """The rate that the next step takes."""
        return self._optimizer._lrs()[self._group]

    @value.setter
    def value(self, lr: Any) -> None:
        self._optimizer._assign_lr(self._group, lr)


class Optimizer(Node):  # type: ignore[misc]
    """The base of all optimizers; not to be instantiated.

    Args:
        lr: A number >= 0, or a scheduler of this module.
        weight_decay: Decay coefficient, >= 0.
        grad_clip_norm: Largest norm of all gradients together, > 0: beyond it they are scaled to
            it. None: no clip.
        grad_clip_value: Largest magnitude of an element of a gradient, > 0, after the norm clip.
            None: no limit.
        donate: True lets steps that are called from Python reuse the memory of old values and
            buffers; what else holds those arrays loses them.
        further: By keyword, other hyper-parameters of the class in `fusedstep`, such as
            `on_nonfinite`, `skip_grad_norm`, `maximize`, `rescale_grad`.

    Raises:
        TypeError, ValueError: If an argument is of a wrong kind or out of range; the message names
            it.

    Numerics:
        A step has the bits of the class in `fusedstep` with the same rates, which are float32
        unless JAX has `jax_enable_x64`. How it compares with braintools is in the documentation.

    Attributes:
        param_states (dict[str, State]): The registered states by name; a name is the path in the
            registered tree, `layers.0.weight`.
        opt_state (OptimState): What the first group keeps from step to step, a
            `fusedstep.jax.State`; None before weights are registered.
        param_groups_opt_states (list[OptimState]): The same of further groups.
        step_count (OptimState): Steps applied so far.
        weight_decay, grad_clip_norm, grad_clip_value: As given to the constructor.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        show_signature(cls)

    def __init__(
        self,
        make: Callable[..., Transform],
        options: Mapping[str, Any],
        lr: float | LRScheduler,
        weight_decay: float,
        grad_clip_norm: float | None,
        grad_clip_value: float | None,
        donate: bool,
    ) -> None:
        super().__init__()
        self.weight_decay = as_number("weight_decay", weight_decay, weight_decay_range)
        self.grad_clip_norm, self.grad_clip_value = grad_clip_norm, grad_clip_value
        self._make = make
        clips = {"grad_clip_norm": grad_clip_norm, "grad_clip_value": grad_clip_value}
        self._options = {**options, **clips}
        self._donate = bool(donate)
        self.param_states: dict[str, Any] = {}
        self.opt_state: OptimState | None = None
        self.param_groups_opt_states: list[OptimState] = []
        self.step_count = OptimState(jnp.zeros((), jnp.int32))
        self._groups: list[Group] = []
        self._schedulers: list[LRScheduler] = []
        self._lr_scheduler = scheduler = scheduler_of(lr)
        self.tx = self.default_tx()  # refuses hyper-parameters now, before anything is attached
        self.lr_scheduler = scheduler

    def default_tx(self) -> Transform:
        """The transform behind the first group, for use without brainstate."""
        return self._group({"weight_decay": self.weight_decay}).transform

    def _group(self, given: Mapping[str, Any], lr: float | None = None, place: int = 0) -> Group:
        """A group without weights."""
        transform = self._make(self.base_lr, **{**self._options, **given})
        return Group((), transform, tuple(given.items()), lr, place)

    # --- weights ------------------------------------------------------------------------------

    def register_trainable_weights(self, param_states: Tree) -> Optimizer:
        """Gives the optimizer its weights, or further ones.

        Args:
            param_states: A pytree of brainstate states, such as
                `model.states(brainstate.ParamState)`. Their values are arrays of float32, float64,
                float16 or bfloat16, or pytrees of them, also `brainunit` quantities. What is
                registered already stays as it is, with its state; a state that occurs twice
                counts once.

        Returns:
            Optimizer: This one.

        Raises:
            TypeError: If a leaf is no state, or a value no such array; the message has its path.
            ValueError: If there are none, or two have the same path. Nothing has changed then.
        """
        found = self._new("param_states", weights_in("param_states", param_states))
        if not found and not self._groups:
            raise ValueError("param_states: holds no states")
        first, *others = self._groups or [self._group({"weight_decay": self.weight_decay})]
        group, states = grown(first, found), {**self.param_states, **states_of(found)}
        values = values_of(group, states)
        fresh = group.transform.init(values)
        if self.opt_state is not None:
            before = values_of(first, states)
            fresh = checkpoint.carried_over(self.opt_state.value, before, fresh, values)
        self.param_states, self._groups = states, [group, *others]
        self.opt_state = OptimState(fresh)
        self._compile()
        return self

    def add_param_group(self, params: Tree, **kwargs: Any) -> None:
        """Adds weights with hyper-parameters of their own; they follow this class's rule.

        One norm clip spans the gradients of all groups.

        Args:
            params: A pytree of brainstate states that are not registered yet.
            kwargs: `lr`: what the scheduler scales for this group (without it: the scheduler's
                rate for this group if it was given a list, else what the last group has), and
                `weight_decay` or any other hyper-parameter of the class except those that concern
                a step as a whole, and `rescale_grad` where anything asks for the norm.

        Raises:
            TypeError, ValueError: As for registration; if a keyword is no hyper-parameter, if a
                state is registered already, or if both `lr` and the scheduler say what the rate of
                the group is. Nothing has changed then.
        """
        if not self._groups:
            raise ValueError("register_trainable_weights must be called before add_param_group")
        whole = [name for name in kwargs if name in CALL_WIDE]
        if whole:
            raise ValueError(f"{whole[0]}: concerns a step as a whole, a group cannot set it")
        weights = weights_in("params", params)
        found = self._new("params", weights)
        if len(found) < len(weights):
            name = next(name for name in weights if name not in found)
            raise ValueError(f"params[{name!r}]: is registered already")
        lr = kwargs.pop("lr", None)
        lr = None if lr is None else as_number("lr", lr, LEARNING_RATE)
        decay = as_number(
            "weight_decay", kwargs.get("weight_decay", self.weight_decay), weight_decay_range
        )
        group = grown(self._group({**kwargs, "weight_decay": decay}, lr), found)
        self._check_scope()
        self._check_scale(group)
        self._check_rate(lr)
        fresh = group.transform.init(values_of(group, states_of(found)))
        place = self._place(len(self._groups), lr)
        self.param_states = {**self.param_states, **states_of(found)}
        self._groups = [*self._groups, replace(group, place=place)]
        self.param_groups_opt_states = [*self.param_groups_opt_states, OptimState(fresh)]
        self._compile()

    def _new(self, argument: str, weights: dict[str, Weight]) -> dict[str, Weight]:
        """Those that are not registered yet."""
        known = {id(state) for state in self.param_states.values()}
        found = {name: w for name, w in weights.items() if id(w.state) not in known}
        for name in found:
            if name in self.param_states:
                raise ValueError(f"{argument}: another state is registered as {name!r} already")
        return found

    def _check_scope(self) -> None:
        """Whether all groups can judge the same gradients."""
        per_array = self._options.get("grad_clip_scope") == "array"
        judges = self._options.get("on_nonfinite") == "skip"
        if per_array and (judges or self._options.get("skip_grad_norm") is not None):
            raise ValueError(
                'grad_clip_scope="array": with several groups there is no skipping of steps; drop '
                "on_nonfinite and skip_grad_norm, or take one group"
            )

    def _check_scale(self, group: Group) -> None:
        """Whether a group may have a scale of its own: a norm of all would have to mix them."""
        groups = [*self._groups, group]
        scaled = any("rescale_grad" in dict(each.given) for each in groups)
        if scaled and any(_asks_for_all(each.transform) for each in groups):
            raise ValueError(
                "rescale_grad: a group cannot have its own where one norm spans all groups (a "
                "clip, on_nonfinite, skip_grad_norm); give it to the constructor"
            )

    # --- the step -----------------------------------------------------------------------------

    def step(self, grads: Mapping[Any, Tree]) -> None:
        """Updates all registered states, in one compiled call.

        Args:
            grads: The gradients, in the form of the registered tree; what
                `brainstate.transform.grad(loss, states)` gives. None leaves a weight alone, and
                entries for other states are ignored. Weights with a unit need gradients in the
                same unit, as brainstate makes them.

        Raises:
            TypeError, ValueError: If no weights are registered, an entry is missing, or a
                gradient has another form, shape or unit than its weight. Nothing has changed then.
        """
        if not self._groups:
            raise ValueError("register_trainable_weights must be called before step")
        values = [values_of(group, self.param_states) for group in self._groups]
        gradients = [
            {name: gradient_at(grads, path, own[name]) for name, path in group.paths}
            for group, own in zip(self._groups, values, strict=True)
        ]
        states = [state.value for state in self._opt_states()]
        states, values = self._compiled(gradients, states, values, self._lrs())
        for own in values:
            for name, value in own.items():
                self.param_states[name].value = value
        for holder, state in zip(self._opt_states(), states, strict=True):
            holder.value = state
        self.step_count.value = states[0].step

    def update(self, grads: Mapping[Any, Tree]) -> None:
        """The same as `step`."""
        self.step(grads)

    def _compile(self) -> None:
        """Another function for other groups: XLA keeps what it has compiled for each."""
        transforms = [group.transform for group in self._groups]

        def step(grads: Trees, states: list[State], values: Trees, lrs: list[Any]) -> Any:
            return stepped(transforms, grads, states, values, lrs)

        self._compiled = jax.jit(step, donate_argnums=(1, 2) if self._donate else ())

    def _opt_states(self) -> list[Any]:
        return [self.opt_state, *self.param_groups_opt_states]

    @property
    def grad_norm(self) -> Any:
        """Norm of all gradients of the last step; -1 if nothing asked for it (a clip does)."""
        return self._first().grad_norm

    @property
    def skipped(self) -> Any:
        """Whether the last step was left out by `on_nonfinite="skip"` or `skip_grad_norm`."""
        return self._first().skipped

    def _first(self) -> State:
        if self.opt_state is None:
            raise ValueError("register_trainable_weights must be called before")
        state: State = self.opt_state.value
        return state

    # --- learning rate ------------------------------------------------------------------------

    @property
    def lr_scheduler(self) -> LRScheduler:
        """The scheduler behind the learning rates; it can be replaced."""
        return self._lr_scheduler

    @lr_scheduler.setter
    def lr_scheduler(self, scheduler: LRScheduler) -> None:
        if not isinstance(scheduler, LRScheduler):
            raise TypeError(
                f"lr_scheduler: expected a scheduler of fusedstep.braintools, got "
                f"{shown(scheduler)}"
            )
        scheduler.optimizer = self
        scheduler._refresh()
        self._lr_scheduler = scheduler
        self._groups = [
            replace(group, place=self._place(index, group.lr))
            for index, group in enumerate(self._groups)
        ]

    def _place(self, index: int, lr: float | None) -> int:
        """Where the scheduler has the rate of a group; it gets one if it has none."""
        known = index < len(self._lr_scheduler.base_lrs)
        return index if known else self._lr_scheduler.add_group(lr)

    def _check_rate(self, lr: float | None) -> None:
        index, rates = len(self._groups), self._lr_scheduler.base_lrs
        if lr is not None and index < len(rates):
            raise ValueError(
                f"lr: got {lr} for group {index}, for which the scheduler has {rates[index]}"
            )

    @property
    def lr(self) -> LRScheduler:
        """The scheduler, as in braintools; the number is `current_lr`."""
        return self._lr_scheduler

    @property
    def schedulers(self) -> list[LRScheduler]:
        """What `add_scheduler` was given."""
        return self._schedulers

    def add_scheduler(self, scheduler: LRScheduler) -> None:
        """Makes this the scheduler of the optimizer (in braintools it has no effect on steps)."""
        self.lr_scheduler = scheduler
        self._schedulers = [*self._schedulers, scheduler]

    @property
    def base_lr(self) -> float:
        """What the scheduler scales for the first group."""
        return self._lr_scheduler.base_lrs[0]

    @property
    def current_lr(self) -> Any:
        """The learning rate of the first group; what is assigned holds until the next epoch."""
        return self._lr_scheduler.current_lrs.value[0]

    @current_lr.setter
    def current_lr(self, value: Any) -> None:
        self._assign_lr(0, value)

    def get_last_lr(self) -> list[Any]:
        """The learning rates now, one per group."""
        return self._lrs() if self._groups else [self.current_lr]

    def lr_apply(self, apply_fn: Callable[[float], float]) -> None:
        """Changes the rates of this epoch by a function."""
        self._lr_scheduler.apply(apply_fn)

    def _lrs(self) -> list[Any]:
        lrs = self._lr_scheduler.current_lrs.value
        return [lrs[group.place] for group in self._groups]

    def _assign_lr(self, group: int, value: Any) -> None:
        place = self._groups[group].place if self._groups else group
        lrs = list(self._lr_scheduler.current_lrs.value)
        lrs[place] = value if is_traced(value) else as_number("lr", value, LEARNING_RATE)
        self._lr_scheduler.current_lrs.value = lrs

    @property
    def param_groups(self) -> list[Mapping[str, Any]]:
        """For each group its `params` (states by name), `lr` (its `.value` is live), and decay.

        They are read-only but for the rates: hyper-parameters are compiled into the step.
        """
        return [
            MappingProxyType(
                {
                    "params": {name: self.param_states[name] for name, _ in group.paths},
                    "lr": GroupLR(self, index),
                    "weight_decay": group.weight_decay,
                }
            )
            for index, group in enumerate(self._groups)
        ]

    # --- state --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state as nested dicts of arrays and numbers, that of the scheduler included.

        Returns:
            dict: `step_count`, `lr`, `base_lr`, `param_groups` (for each its `params`, by name, its
            `lr` and `weight_decay`), `opt_state` and `param_groups_opt_states` (buffers,
            counts), `lr_scheduler`. The weights are not included: save the model's states.
        """
        return checkpoint.capture(self)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on where an optimizer of the same class, with the same weights, stood.

        Raises:
            ValueError: If an entry is missing, or names, groups, shapes, dtypes or the scheduler do
                not fit. Nothing has changed then.
        """
        checkpoint.restore(self, state_dict)


def scheduler_of(lr: Any) -> LRScheduler:
    """The scheduler that `lr` is, or a constant one."""
    if isinstance(lr, LRScheduler):
        return lr
    kind = type(lr)
    if hasattr(lr, "base_lr") or hasattr(lr, "base_lrs") or callable(lr):
        raise TypeError(
            f"lr: expected a number or a scheduler of fusedstep.braintools, got an object of type "
            f"{kind.__module__}.{kind.__qualname__}; fusedstep.braintools has braintools' classes"
        )
    return ConstantLR(as_number("lr", lr, LEARNING_RATE), factor=1.0, total_iters=0)


def grown(group: Group, found: Mapping[str, Weight]) -> Group:
    """The group with further weights."""
    paths = (*group.paths, *((name, weight.path) for name, weight in found.items()))
    return replace(group, paths=paths)


def states_of(found: Mapping[str, Weight]) -> dict[str, Any]:
    """The states by name."""
    return {name: weight.state for name, weight in found.items()}


def values_of(group: Group, states: Mapping[str, Any]) -> dict[str, Tree]:
    """The values of a group's states by name."""
    return {name: states[name].value for name, _ in group.paths}


def stepped(
    transforms: list[Transform], grads: Trees, states: list[State], values: Trees, lrs: list[Any]
) -> tuple[list[State], Trees]:
    """One step of all groups, whose gradients have one norm together.

    States come before values in what goes in and in what comes out: XLA gives the memory of donated
    arguments to results of the same size in this order.
    """
    asking = [_asks_for_all(transform) for transform in transforms]
    joint = _norm_of_all(values, grads) if len(transforms) > 1 and any(asking) else None
    norms = [joint if asks else None for asks in asking]
    results = [
        transform.step(*trees, lr=lr, grad_norm=norm)
        for transform, trees, lr, norm in zip(
            transforms, zip(grads, states, values, strict=True), lrs, norms, strict=True
        )
    ]
    return [state for _, state in results], [value for value, _ in results]


def _asks_for_all(transform: Transform) -> bool:
    """Whether a transform uses the norm of all gradients together."""
    options = transform.options
    return options.measures and options.grad_clip_scope == "all"


def _norm_of_all(values: Trees, grads: Trees) -> Measured:
    leaves = leaves_of(values)
    parts, _ = measure(leaves, gradients_of(leaves, grads), axes_of(leaves, None), False)
    return Measured(parts, [], False, None)
