"""What all optimizers share: groups, one call into the core per step, learning rate, state."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from fusedstep import _core
from fusedstep.buffers import copy_like
from fusedstep.codegen import Declaration, Packer, make_packer
from fusedstep.docs import class_docstring
from fusedstep.groups import (
    Group,
    Key,
    Members,
    assign_rows,
    check_complete,
    check_unchanged,
    is_group_list,
    leaf_keys,
    make_plan,
    read_groups,
)
from fusedstep.hyperparameters import Params, Tree, declared, given_norm, lr_range
from fusedstep.ranges import shown
from fusedstep.schedules import ConstantLR, Schedule

if TYPE_CHECKING:
    from os import PathLike


class Optimizer(ABC):
    """Updates arrays in place; the base of all optimizers, not to be instantiated.

    A subclass declares its hyper-parameters in the annotated signature of `__init__` and names its
    rules; the checks, the rows for the compiled core and the functional form follow from that.

    Attributes:
        param_groups (list[dict]): One dict per group: its tree under `params`, and all
            hyper-parameters. Live: what is assigned here holds from the next step on.
        defaults (dict): The hyper-parameters of groups that do not set them.
        on_nonfinite (str): As given to the constructor; may be changed between steps.
    """

    declaration: ClassVar[Declaration]
    _packers: ClassVar[dict[str, Packer]]

    def __init_subclass__(
        cls, *, rules: tuple[str, ...], function: str, fixed: Mapping[str, str]
    ) -> None:
        super().__init_subclass__()
        hypers = declared(cls.__init__)
        cls.declaration = Declaration(cls.__name__, function, rules, hypers, fixed)
        cls._packers = {rule: make_packer(cls.declaration, rule) for rule in rules}
        if cls.__doc__ is not None:  # python -OO
            cls.__doc__ = class_docstring(cls.__doc__, hypers)

    @abstractmethod
    def __init__(self) -> None:
        """Subclasses declare their hyper-parameters here and pass `locals()` to `_set_up`."""

    def _set_up(self, arguments: Mapping[str, Any]) -> None:
        self.on_nonfinite: str = arguments["on_nonfinite"]
        self.defaults: Group = {h.name: arguments[h.name] for h in self.declaration.of_group()}
        self.param_groups: list[Group] = []
        self._plan: _core.Plan | None = None
        self._trees: list[Tree] = []
        self._keys: list[Key] = []
        self._members: list[Members] = []
        self._follow: list[int] = []  # groups without a learning rate of their own
        self._grouped = False  # gradients come as a list of trees, one per group
        self._steps = 0
        self._plain_lr = _PlainLR(self)
        for hyper in self.declaration.hypers:
            function = callable(arguments[hyper.name]) and hyper.name in {"lr", "weight_decay"}
            if not function:
                hyper.check(hyper.name, arguments[hyper.name])
        self._rule_of(self.defaults)
        if arguments["params"] is not None:
            self.register_trainable_weights(arguments["params"])

    # --- parameters ---------------------------------------------------------------------------

    def register_trainable_weights(self, params: Params) -> None:
        """Gives the optimizer its parameters, or further ones.

        Args:
            params: A tree of arrays, or a list of param groups (dicts with the key `params`, which
                may set any hyper-parameter). Parameters that are registered already stay, with
                their state; a tree that comes later becomes a group of its own, and gradients are
                then a list of trees, one per group. A tree that is registered already is read
                anew: arrays that were put into it since start without state.

        Raises:
            TypeError: If a leaf is no array that can be updated in place.
            ValueError: If there is no array, a group has an unknown key or a value out of range,
                or an array is registered already. Nothing has changed then.
        """
        again = any(tree is params for tree in self._trees)
        listed = params if is_group_list(params) else None
        new = [] if again else read_groups(params, self.defaults)
        groups = self.param_groups + new
        grouped = self._grouped or listed is not None or len(groups) > 1
        plan = make_plan(groups, grouped, self._plan)
        keys = leaf_keys(plan, groups)
        members = assign_rows(plan, groups)
        self._rows(groups, members)
        own_lr = ["lr" in group for group in listed] if listed else [False] * len(new)
        self._follow += [len(self.param_groups) + k for k, own in enumerate(own_lr) if not own]
        self.param_groups += new
        self._bind(plan, keys, members)
        self._grouped = grouped

    def add_param_group(self, group: Mapping[str, Any]) -> None:
        """Registers one more param group: a dict with the key `params`."""
        if not is_group_list([group]):
            raise ValueError(f"group: expected a dict with the key 'params', got {shown(group)}")
        self.register_trainable_weights([group])

    def _bind(self, plan: _core.Plan, keys: list[Key], members: list[Members]) -> None:
        self._plan, self._keys, self._members = plan, keys, members
        self._trees = [group["params"] for group in self.param_groups]

    def _bound_plan(self) -> _core.Plan:
        if self._plan is None:
            raise ValueError(
                "params: no parameters are registered; pass them to the constructor or to "
                "register_trainable_weights"
            )
        trees = [group.get("params") for group in self.param_groups]
        if len(trees) != len(self._trees) or any(map(operator.is_not, trees, self._trees)):
            raise ValueError(
                "param_groups: a group or its 'params' was replaced; assign to arrays in place "
                "(array[...] = new), and add groups with add_param_group"
            )
        return self._plan

    # --- the step -----------------------------------------------------------------------------

    def step(
        self,
        grads: Tree = None,
        *,
        grad_norm: float | None = None,
        param_copy: Tree = None,
    ) -> _core.StepResult:
        """Updates all parameters in place, in one call into the compiled core.

        Args:
            grads: The gradients, in the form of the parameters: the same tree, or a list with one
                tree per param group. A None leaves its parameter alone. Without `grads`, each
                parameter's `.grad` is read.
            grad_norm: The norm of all gradients, before `rescale_grad`, if the caller has reduced
                it already (over processes or shards).
            param_copy: float16 or bfloat16 arrays, in the form of the parameters, that receive the
                new parameters, rounded once.

        Returns:
            StepResult: `grad_norm`, `clip_coef` and `skipped`; `state` is empty.

        Raises:
            TypeError: If gradients have another form than the parameters, or are no arrays.
            ValueError: If shapes, dtypes or strides disagree, a hyper-parameter is out of range, or
                no parameters are registered.
            BufferError: If a parameter is read-only or overlaps another array.
            FloatingPointError: With `on_nonfinite="raise"`, if a gradient holds inf or NaN.
                A step that raises has changed nothing.
        """
        plan = self._bound_plan()
        rows = self._rows(self.param_groups, self._members)
        result = plan.step(
            self._per_group("grads", grads),
            rows,
            self.on_nonfinite,
            given_norm(grad_norm),
            self._per_group("param_copy", param_copy),
        )
        if not result.skipped:
            self._steps += 1
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Sets each parameter's `.grad` to None, or fills it with zeros.

        Args:
            set_to_none: False keeps the arrays and fills them.
        """
        self._bound_plan().zero_grad(bool(set_to_none))

    def _per_group(self, name: str, trees: Tree) -> list[Tree] | None:
        if trees is None:
            return None
        if not self._grouped:
            return [trees]
        count, listed = len(self.param_groups), isinstance(trees, (list, tuple))
        if not listed or len(trees) != count:
            got = f"{len(trees)} of them" if listed else shown(trees)
            raise ValueError(f"{name}: expected a list of {count} trees, one per group, got {got}")
        return [group["params"] for group in trees] if is_group_list(trees) else list(trees)

    def _rows(self, groups: list[Group], members: list[Members]) -> list[tuple[int, _core.Row]]:
        """The rows of this step, in the order in which `assign_rows` counted them."""
        for index, group in enumerate(groups):
            check_complete(f"param_groups[{index}]", group, self.defaults)
        if any(map(_has_new_decay, groups, members)):
            members = self._members = assign_rows(self._bound_plan(), groups)
        rows = []
        for index, (group, member) in enumerate(zip(groups, members, strict=True)):
            try:
                rule, lr, decay = self._rule_of(group), self._lr_of(group), group["weight_decay"]
                decays = member.decays if callable(decay) else (decay,) * len(member.decays)
                rows += [self._packers[rule](group, lr, each) for each in decays]
            except (TypeError, ValueError) as error:
                if len(groups) == 1 or type(error) not in {TypeError, ValueError}:
                    raise
                raise type(error)(f"param_groups[{index}]: {error}") from None
        return rows

    def _rule_of(self, group: Group) -> str:  # noqa: ARG002
        """The rule that serves a group with these hyper-parameters."""
        return self.declaration.rules[0]

    # --- learning rate ------------------------------------------------------------------------

    def _lr_of(self, group: Group) -> float:
        lr = group["lr"]
        return lr if type(lr) is float else lr_range.at("lr", lr, self._steps)

    def _lr_holders(self) -> list[Group]:
        """Where `lr` is kept: groups without a learning rate of their own, else all; defaults."""
        following = [self.param_groups[index] for index in self._follow]
        return [*(following or self.param_groups), self.defaults]

    @property
    def steps(self) -> int:
        """Number of steps that were applied; skipped ones do not count."""
        return self._steps

    @property
    def lr(self) -> float:
        """The learning rate of the groups that have none of their own (or, of the first group).

        Assigning a number changes the schedule's `current_lr` if there is a schedule, and replaces
        a number, buffer or function otherwise.
        """
        return self._lr_of(self._lr_holders()[0])

    @lr.setter
    def lr(self, value: float) -> None:
        number = lr_range.number("lr", value)
        for group in self._lr_holders():
            if isinstance(group["lr"], Schedule):
                group["lr"].current_lr = number
            else:
                group["lr"] = number

    @property
    def lr_scheduler(self) -> Schedule:
        """The schedule behind `lr`; a constant one if `lr` is no schedule.

        Assigning a schedule gives it to the groups whose learning rate `lr` is.
        """
        lr = self._lr_holders()[0]["lr"]
        return lr if isinstance(lr, Schedule) else self._plain_lr

    @lr_scheduler.setter
    def lr_scheduler(self, schedule: Schedule) -> None:
        if not isinstance(schedule, Schedule):
            raise TypeError(f"lr_scheduler: expected a schedule, got {shown(schedule)}")
        for group in self._lr_holders():
            group["lr"] = schedule

    # --- state --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state as a dict, with live references to the buffers.

        Returns:
            dict: `state`, for each array that has made a step (key: index in a sequence, dotted
            path in a dict) a dict of its buffers and its `step`; `param_groups`, the
            hyper-parameters with the keys of the group's arrays under `params` and the schedule's
            state under `lr_scheduler`; `steps`, as the attribute. Functions are not included.
        """
        from fusedstep.checkpoints import capture

        return capture(self)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over a state that `state_dict` gave; buffers are copied.

        Raises:
            TypeError: If something in it is of a wrong kind, a list where a buffer belongs, say.
            ValueError: If keys, shapes, dtypes, groups, numbers or schedules do not fit, or the
                trees of parameters have changed since they were registered. Either way, nothing
                has changed then.
        """
        from fusedstep.checkpoints import restore

        restore(self, state_dict)

    def save(self, path: str | PathLike[str], *, params: bool = True) -> None:
        """Writes state, schedules and parameters to an `.npz` file, at once or not at all.

        Args:
            path: File to write; one that exists is replaced when the new one is complete.
            params: False leaves the parameters out.

        Raises:
            OSError: If the file cannot be written. An old file is still there then.
        """
        from fusedstep import checkpoints

        checkpoints.save(self, path, params=params)

    def load(self, path: str | PathLike[str], *, params: bool = True) -> None:
        """Reads a file of `save` into the optimizer and, in place, into the parameters.

        Args:
            path: File to read.
            params: False leaves the parameters as they are, even if the file has them.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If it is no checkpoint, is damaged, or does not fit this optimizer. Nothing
                has changed then.
        """
        from fusedstep import checkpoints

        checkpoints.load(self, path, params=params)

    def __getstate__(self) -> dict[str, Any]:
        plan = self._plan
        leaves = []
        if plan is not None:
            registered = [plan.leaf(i) for i in range(len(plan))]
            check_unchanged(make_plan(self.param_groups, self._grouped), registered)
            leaves = [(plan.get_state(i), plan.get_steps(i)) for i in range(len(plan))]
        return {**vars(self), "_plan": leaves, "_trees": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._plan = None
        if not self.param_groups:
            return
        plan = make_plan(self.param_groups, self._grouped)
        for leaf, (kept, steps) in enumerate(state["_plan"]):
            # Pickling keeps the strides of a buffer only if it is in C or Fortran order.
            plan.set_state(leaf, tuple(copy_like(plan.leaf(leaf), buffer) for buffer in kept))
            plan.set_steps(leaf, steps)
        self._bind(plan, self._keys, assign_rows(plan, self.param_groups))

    def __repr__(self) -> str:
        group = self.param_groups[0] if len(self.param_groups) == 1 else self.defaults
        hypers = [
            f"{hyper.name}={group[hyper.name]!r}"
            for hyper in self.declaration.of_group()
            if hyper.name in {"lr", "momentum"} or group[hyper.name] != hyper.default
        ]
        sizes = {"array": len(self._keys), "group": len(self.param_groups), "step": self._steps}
        counts = [f"{size} {noun}{'s' * (size != 1)}" for noun, size in sizes.items()]
        return f"{type(self).__name__}({', '.join(hypers)}; {', '.join(counts)})"


def _has_new_decay(group: Group, member: Members) -> bool:
    decay = group["weight_decay"]
    return callable(decay) and decay is not member.decay


class _PlainLR(ConstantLR):
    """The schedule of an optimizer whose `lr` is no schedule: constant, and always that `lr`."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self.last_epoch = 0
        self.factor = 1.0
        self.total_iters = 0
        self._assigned = None

    @property
    def base_lr(self) -> float:
        return self._optimizer.lr

    @base_lr.setter
    def base_lr(self, value: float) -> None:
        self._optimizer.lr = value

    @property
    def current_lr(self) -> float:
        return self._optimizer.lr

    @current_lr.setter
    def current_lr(self, value: float) -> None:
        self._optimizer.lr = value

    def _type(self) -> str:
        return "ConstantLR"

    def _constants(self) -> dict[str, Any]:
        return {"base_lr": self.base_lr, "last_epoch": self.last_epoch}
