"""What all optimizers share: groups, one call into the core per step, learning rate, state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, SupportsFloat

from fusedstep import _core
from fusedstep.buffers import copy_like
from fusedstep.codegen import Declaration, Packer, make_packer, make_policy
from fusedstep.describe import describe
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
from fusedstep.hyperparameters import (
    Params,
    Tree,
    declared,
    given_norm,
    lr_range,
    weight_decay_range,
)
from fusedstep.ranges import Check, Real, shown
from fusedstep.scheduled import READ_THERE, Scheduled, for_step, is_function_of_t
from fusedstep.schedules import ConstantLR, Schedule

if TYPE_CHECKING:
    from collections.abc import Callable
    from os import PathLike

_SCALE = Real(-float("inf"), float("inf"), "()")


class Optimizer(ABC):
    """Updates arrays in place; the base of all optimizers, not to be instantiated.

    A subclass declares its hyper-parameters in the annotated signature of `__init__` and names its
    rules; the checks, the rows for the compiled core and the functional form follow from that.

    Attributes:
        param_groups (list[dict]): One dict per group: its tree under `params`, and all
            hyper-parameters. Live: what is assigned here holds from the next step on.
        defaults (dict): The hyper-parameters of groups that do not set them.
        on_nonfinite, grad_clip_scope, skip_grad_norm: As given to the constructor; may be changed
            between steps.
    """

    declaration: ClassVar[Declaration]
    _pack: ClassVar[Packer]
    _policy: ClassVar[Callable[[Any], _core.Policy]]
    _scheduled: ClassVar[tuple[str, ...]]  # hyper-parameters that may be functions of t

    def __init_subclass__(
        cls,
        *,
        rules: Mapping[str, str],
        function: str,
        function_rules: tuple[str, ...] = (),
        derived: Mapping[str, str],
    ) -> None:
        super().__init_subclass__()
        hypers = declared(cls.__init__)
        cls.declaration = Declaration(
            cls.__name__, function, rules, function_rules or tuple(rules), hypers, derived
        )
        cls._pack = staticmethod(make_packer(cls.declaration))
        cls._policy = staticmethod(make_policy(cls.declaration))
        cls._scheduled = tuple(h.name for h in hypers if isinstance(h.check, Scheduled))
        if cls.__doc__ is not None:  # python -OO
            cls.__doc__ = class_docstring(cls.__doc__, hypers)

    @abstractmethod
    def __init__(self) -> None:
        """Subclasses declare their hyper-parameters here and pass `locals()` to `_set_up`."""

    def _set_up(self, arguments: Mapping[str, Any]) -> None:
        self.on_nonfinite: str = arguments["on_nonfinite"]
        self.grad_clip_scope: str = arguments["grad_clip_scope"]
        self.skip_grad_norm: float | None = arguments["skip_grad_norm"]
        self.defaults: Group = {h.name: arguments[h.name] for h in self.declaration.of_group()}
        self.param_groups: list[Group] = []
        self._plan: _core.Plan | None = None
        self._trees: list[Tree] = []
        self._keys: list[Key] = []
        self._members: list[Members] = []
        self._follow: list[int] = []  # groups without a learning rate of their own
        self._grouped = False  # gradients come as a list of trees, one per group
        self._steps = self._skipped_steps = 0
        self._on_device = False  # the plan has counted steps of a device
        self._plain_lr = _PlainLR(self)
        for hyper in self.declaration.hypers:
            _check_first(hyper.name, hyper.check, arguments[hyper.name])
        self._check_form(self.defaults)
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
        self._check_groups()
        again = any(tree is params for tree in self._trees)
        listed = params if is_group_list(params) else None
        new = [] if again else read_groups(params, self.defaults)
        groups = self.param_groups + new
        grouped = self._grouped or listed is not None or len(groups) > 1
        plan = make_plan(groups, grouped, self.declaration.slots, self._plan)
        keys = leaf_keys(plan, groups)
        members = assign_rows(plan, groups)
        self._rows(groups, members)
        self._check_not_accumulated("params")
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
        self._take_counts()
        self._plan, self._keys, self._members = plan, keys, members
        self._trees = [group["params"] for group in self.param_groups]

    def _bound_plan(self) -> _core.Plan:
        if self._plan is None:
            raise ValueError(
                "params: no parameters are registered; pass them to the constructor or to "
                "register_trainable_weights"
            )
        self._check_groups()
        return self._plan

    def _check_groups(self) -> None:
        """Refuses groups that were deleted, or trees that were replaced, behind our back."""
        same = len(self.param_groups) == len(self._trees)
        for group, tree in zip(self.param_groups, self._trees, strict=False):
            same = same and group.get("params") is tree
        if not same:
            raise ValueError(
                "param_groups: a group or its 'params' was replaced; assign to arrays in place "
                "(array[...] = new), and add groups with add_param_group"
            )

    def _check_not_accumulated(self, name: str) -> None:
        if self._plan is not None and self._plan.has_accumulated():
            raise ValueError(f"{name}: gradients wait for a step; call step() or zero_grad() first")

    # --- the step -----------------------------------------------------------------------------

    def step(
        self,
        grads: Tree = None,
        *,
        grad_norm: SupportsFloat | None = None,
        param_copy: Tree = None,
        found_inf: SupportsFloat | None = None,
        stream: Any = None,
    ) -> _core.StepResult | _core.DeviceStepResult:
        """Updates all parameters in place, in one call into the compiled core.

        Args:
            grads: The gradients, in the form of the parameters: the same tree, or a list with one
                tree per param group. A None leaves its parameter alone. Without `grads`, each
                parameter's `.grad` is read, or, after `accumulate`, what was accumulated is used.
            grad_norm: The norm of all gradients, before `rescale_grad`, if the caller has reduced
                it already (over processes or shards).
            param_copy: float16 or bfloat16 arrays, in the form of the parameters, that receive the
                new parameters, rounded once.
            found_inf: A number or an array of one element; not 0 skips the step, as a loss scaler
                asks for.
            stream: For arrays on a GPU, the stream on which the step runs: a handle, or an object
                that has one. None: the one on which the parameters' library works now.

        Returns:
            StepResult: `grad_norm`, `clip_coef`, `skipped` and `grad_norms`; `state` is empty. For
            arrays on a GPU a `DeviceStepResult` with the same attributes, which waits for the step
            when one of them is read.

        Raises:
            TypeError: If gradients have another form than the parameters, or are no arrays.
            ValueError: If shapes, dtypes or strides disagree, a hyper-parameter is out of range,
                no parameters are registered, or `grads` come beside accumulated ones.
            BufferError: If a parameter is read-only or overlaps another array.
            FloatingPointError: With `on_nonfinite="raise"`, if a gradient holds inf or NaN.
            RuntimeError: If arrays are on a GPU that cannot be used.
                A step that raises has changed nothing.
        """
        plan = self._bound_plan()
        result = plan.step(
            self._per_group("grads", grads),
            self._rows(self.param_groups, self._members),
            type(self)._policy(self),
            None if grad_norm is None else given_norm(grad_norm),
            self._per_group("param_copy", param_copy),
            found_inf=found_inf,
            stream=stream,
        )
        if type(result) is not _core.StepResult:
            self._on_device = True
        elif result.skipped:
            self._skipped_steps += 1
        else:
            self._steps += 1
        return result

    def accumulate(self, grads: Tree = None, *, scale: float = 1.0, stream: Any = None) -> None:
        """Adds gradients to those that the next `step()` uses, in buffers of the optimizer.

        The buffers are float32 (float64 for float64 parameters), one per parameter, made at the
        first call by the parameter's library and used again. Each pass also leaves the sums of
        squares of what it wrote, so the step needs no second read for its norm. A step, applied or
        skipped, uses them up; one that raises does not.

        Args:
            grads: The gradients, as for `step`. A None adds nothing to its parameter's. A `.grad`
                that is read stays as it is: clear it between passes (`model.zero_grad()`; the
                optimizer's `zero_grad` would drop the sums as well).
            scale: Factor of these gradients, finite: `1/n` for the mean of n passes.
            stream: As for `step`.

        Raises:
            TypeError, ValueError, BufferError: As `step` does; nothing has changed then.

        Example:
            >>> import numpy as np, fusedstep as fs
            >>> weights = np.ones(2, np.float32)
            >>> optimizer = fs.SGD(weights, lr=0.5)
            >>> for part in ([1.0, 3.0], [3.0, 1.0]):
            ...     optimizer.accumulate(np.array(part, np.float32), scale=1 / 2)
            >>> result = optimizer.step()
            >>> weights
            array([0., 0.], dtype=float32)
        """
        plan = self._bound_plan()
        plan.accumulate(self._per_group("grads", grads), _SCALE.number("scale", scale), stream)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Sets each `.grad` to None, or fills it with zeros, and drops accumulated gradients.

        Args:
            set_to_none: False keeps the arrays and fills them.
        """
        self._bound_plan().zero_grad(bool(set_to_none))

    def _new_plan(self) -> _core.Plan:
        return make_plan(self.param_groups, self._grouped, self.declaration.slots)

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
        if any(map(_has_new_decay, groups, members)):
            members = self._members = assign_rows(self._bound_plan(), groups)
        rows: list[tuple[int, _core.Row]] = []
        for index, group in enumerate(groups):
            try:
                rows += self._rows_of(group, members[index].decays)
            except (TypeError, ValueError, KeyError) as error:
                check_complete(f"param_groups[{index}]", group, self.defaults)
                if len(groups) == 1 or type(error) not in {TypeError, ValueError}:
                    raise
                raise type(error)(f"param_groups[{index}]: {error}") from None
        return rows

    def _rows_of(self, group: Group, decays: tuple[float, ...]) -> list[tuple[int, _core.Row]]:
        """A row for each of the decays of a group's arrays."""
        if len(group) != len(self.defaults) + 1:
            raise KeyError
        pack, t, decay = type(self)._pack, self._t_of(group), group["weight_decay"]
        if callable(decay):
            rows = [pack(group, t, each) for each in decays]
        else:
            rows = [pack(group, t, decay)] * len(decays)
        self._check_form(group)  # of values that are in range
        return rows

    @staticmethod  # noqa: B027
    def _check_form(group: Mapping[str, Any]) -> None:
        """Refuses hyper-parameters that do not go together."""

    # --- learning rate ------------------------------------------------------------------------

    def _lr_of(self, group: Group) -> float:
        lr = group["lr"]
        return lr if type(lr) is float else lr_range.at("lr", lr, self._t_of(group))

    def _lr_holders(self) -> list[Group]:
        """Where `lr` is kept: groups without a learning rate of their own, else all; defaults."""
        self._check_groups()
        following = [self.param_groups[index] for index in self._follow]
        return [*(following or self.param_groups), self.defaults]

    @property
    def steps(self) -> int:
        """Number of steps that were applied; skipped ones do not count.

        Waits for a GPU that may have skipped some, or replayed a graph, since it was last asked.
        """
        self._take_counts()
        return self._steps

    @property
    def skipped_steps(self) -> int:
        """Number of steps that `on_nonfinite`, `skip_grad_norm` or `found_inf` left out."""
        self._take_counts()
        return self._skipped_steps

    def _take_counts(self) -> None:
        if self._on_device and self._plan is not None:
            applied, skipped = self._plan.take_counts()
            self._steps += applied
            self._skipped_steps += skipped

    def _t_of(self, group: Group) -> int:
        """The t of functions; without any, a device is not asked for it."""
        if self._on_device and any(is_function_of_t(group[name]) for name in self._scheduled):
            self._take_counts()
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

        Assigning a schedule gives it to the groups whose learning rate `lr` is. The schedule of a
        plain number gives them that number.
        """
        lr = self._lr_holders()[0]["lr"]
        return lr if isinstance(lr, Schedule) else self._plain_lr

    @lr_scheduler.setter
    def lr_scheduler(self, schedule: Schedule) -> None:
        if not isinstance(schedule, Schedule):
            raise TypeError(f"lr_scheduler: expected a schedule, got {shown(schedule)}")
        plain = isinstance(schedule, _PlainLR)  # it would ask the optimizer, which would ask it
        lr = schedule.current_lr if plain else schedule
        for group in self._lr_holders():
            group["lr"] = lr

    # --- state --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state as a dict, with live references to the buffers.

        Returns:
            dict: `state`, for each array that has made a step (key: index in a sequence, dotted
            path in a dict) a dict of its buffers, its `step` and, for `NAdam`, its `mu_product`;
            `param_groups`, the hyper-parameters with the keys of the group's arrays under `params`
            and the states of schedules under `lr_scheduler` and `momentum_scheduler`;
            `on_nonfinite`, `grad_clip_scope`, `skip_grad_norm`, `steps` and `skipped_steps`, as the
            attributes. Of a function ("function" stands in its place) and of accumulated gradients
            nothing is included.
        """
        from fusedstep.checkpoints import capture

        return capture(self)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over a state that `state_dict` gave; buffers are copied.

        Numbers change, and what schedules and buffers of one number hold; schedules, functions and
        buffers stay the objects that they are here. A function must stand where one was saved.

        Raises:
            TypeError: If something in it is of a wrong kind, a list where a buffer belongs, say.
            ValueError: If keys, shapes, dtypes, groups, numbers or schedules do not fit, the
                trees of parameters have changed since they were registered, or accumulated
                gradients wait for a step. Either way, nothing has changed then.
        """
        from fusedstep.checkpoints import restore

        restore(self, state_dict)

    def set_state(
        self,
        *,
        step: SupportsFloat | None = None,
        mu_product: SupportsFloat | None = None,
        **trees: Tree,
    ) -> None:
        """Takes over state from elsewhere: another library's run, or a functional one.

        Args:
            step: How many steps the state has seen, for all arrays and as `steps`; None leaves the
                counts alone. A whole number, or an array of one element with it, as in PyTorch.
            mu_product: The product of the momenta of these steps (`NAdam`), a number or an array of
                one element; None leaves it alone.
            trees: State buffers by name (`velocity=`, `exp_avg=`, ...), in the form of the
                parameters: the same tree, or a list with one tree per param group. They are copied,
                into arrays of the parameters' library, and rounded if the state cannot have their
                dtype; a None, for a leaf or a branch, leaves its state alone.

        Raises:
            TypeError: If a name is no state of this optimizer, a leaf no array, or a number none.
            ValueError: If trees or shapes disagree, a number is out of range, or accumulated
                gradients wait for a step. Nothing has changed then.

        Example:
            >>> import numpy as np, fusedstep as fs
            >>> weights = {"w": np.ones(2, np.float32)}
            >>> optimizer = fs.Momentum(weights, lr=0.5, momentum=0.5)
            >>> optimizer.set_state(velocity={"w": np.array([2.0, 4.0], np.float32)}, step=10)
            >>> result = optimizer.step({"w": np.zeros(2, np.float32)})
            >>> weights["w"]
            array([0.5, 0. ], dtype=float32)
        """
        from fusedstep import checkpoints

        scalars = {"step": step, "mu_product": mu_product}
        checkpoints.assign(self, trees, {k: v for k, v in scalars.items() if v is not None})

    def save(self, path: str | PathLike[str], *, params: bool = True) -> None:
        """Writes state, schedules and parameters to a file, at once or not at all.

        Whatever ends the process meanwhile, the file is the old one or the new one, complete; a
        temporary one may be left beside it, `.<name>.*.tmp` or `.tmp*`, which does no harm.
        Functions and accumulated gradients are not saved.

        Args:
            path: File to write; one that exists is replaced when the new one is complete. Its
                suffix says what it becomes: `.npz`, which NumPy reads, or `.safetensors`, which
                needs `pip install fusedstep[safetensors]`.
            params: False leaves the parameters out.

        Raises:
            ValueError: If the suffix is another one.
            ModuleNotFoundError: If the package `safetensors` is missing.
            OSError: If the file cannot be written. An old file is still there then.
        """
        from fusedstep import checkpoints

        checkpoints.save(self, path, params=params)

    def load(self, path: str | PathLike[str], *, params: bool = True) -> None:
        """Reads a file of `save` into the optimizer and, in place, into the parameters.

        Args:
            path: File to read, `.npz` or `.safetensors`.
            params: False leaves the parameters as they are, even if the file has them.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If it is no checkpoint, is damaged, or does not fit this optimizer, or
                accumulated gradients wait for a step. Nothing has changed then.
        """
        from fusedstep import checkpoints

        checkpoints.load(self, path, params=params)

    def __getstate__(self) -> dict[str, Any]:
        self._check_not_accumulated("copy")  # a copy has no sums
        self._take_counts()
        plan = self._plan
        leaves = []
        if plan is not None:
            registered = [plan.leaf(i) for i in range(len(plan))]
            check_unchanged(self._new_plan(), registered)
            leaves = [(plan.get_state(i), *plan.get_progress(i)) for i in range(len(plan))]
        return {**vars(self), "_plan": leaves, "_trees": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._plan = None
        if not self.param_groups:
            return
        plan = self._new_plan()
        for leaf, (kept, steps, product) in enumerate(state["_plan"]):
            # Pickling keeps the strides of a buffer only if it is in C or Fortran order.
            copies = {name: copy_like(plan.leaf(leaf), buffer) for name, buffer in kept.items()}
            plan.set_state(leaf, copies)
            plan.set_progress(leaf, steps, product)
        self._bind(plan, self._keys, assign_rows(plan, self.param_groups))

    def __repr__(self) -> str:
        return describe(self)


def _check_first(name: str, check: Check, value: Any) -> None:
    """What a constructor can check of an argument: not what a function will return."""
    may_be_function = isinstance(check, Scheduled) or check is weight_decay_range
    if not (may_be_function and callable(value) and not isinstance(value, type)):
        if name in READ_THERE:
            for_step(check, name, value, 0)
        else:
            check.at(name, value, 0) if isinstance(check, Scheduled) else check(name, value)


def _has_new_decay(group: Group, member: Members) -> bool:
    decay = group.get("weight_decay")
    return type(decay) is not float and callable(decay) and decay is not member.decay


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
