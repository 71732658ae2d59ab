"""What all classes share: a torch optimizer around one call into the compiled core per step."""

from __future__ import annotations

import math
import operator
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch

import fusedstep
from fusedstep import _core
from fusedstep.codegen import Packer
from fusedstep.torch import amp, checkpoints, compiled, distributed
from fusedstep.torch.backward import Observer
from fusedstep.torch.docs import class_docstring
from fusedstep.torch.leaves import MASTER, Leaf, make_leaf
from fusedstep.torch.overlap import check_apart
from fusedstep.torch.signatures import (
    Form,
    check_first,
    make_initializer,
    plain,
    with_numbers,
)

Result: TypeAlias = _core.StepResult | _core.DeviceStepResult


class Bound(NamedTuple):
    """The leaves of all groups, and the plan over them.

    Attributes:
        plan: Has one tree per group, a list; the leaves of all groups in a row are its leaves.
        leaves: In the order of the plan.
        groups: (index, number of leaves) of each group that has any; those are the plan's trees.
        direct: The core may read all gradients by itself.
        sharded: Other processes hold parts of some parameter.
        lists: `params` of each param group, and what it held.
        watched: The core would not notice that such a list or a parameter's memory has changed.
    """

    plan: _core.Plan
    leaves: list[Leaf]
    groups: list[tuple[int, int]]
    direct: bool
    sharded: bool
    lists: list[tuple[Any, tuple[Any, ...]]]
    watched: bool

    def fits(self, param_groups: list[dict[str, Any]], closely: bool) -> bool:
        """Whether these are still the groups; `closely`: and their parameters what they were."""
        if len(param_groups) != len(self.lists):
            return False
        for group, (params, _) in zip(param_groups, self.lists, strict=True):
            if group["params"] is not params:
                return False
        return not closely or not (
            any(len(params) != len(held) for params, held in self.lists)
            or not all(all(map(operator.is_, *pair)) for pair in self.lists)
            or any(leaf.stale for leaf in self.leaves)
        )

    def spelled(self, message: str) -> str:
        """A message of the core, with the gradients named as torch's users know them."""

        def name(match: re.Match[str]) -> str:
            tree, place = (match[1], match[2]) if match[2] else (0, match[1])
            first = sum(count for _, count in self.groups[: int(tree)])
            return f"{self.leaves[first + int(place)].name}.grad"

        return re.sub(r"^grads\[(\d+)\](?:\[(\d+)\])?", name, message)

    def has_negated(self) -> bool:
        """Whether a gradient is a lazily negated view, as complex numbers leave some to scalars."""
        grads = (leaf.param.grad for leaf in self.leaves)
        return any(grad is not None and grad.is_neg() for grad in grads)

    def per_group(self, values: list[Any]) -> list[list[Any]]:
        """What there is per leaf, in the form of the plan's trees."""
        return split(values, self.groups)


def _left_out(norm: float | None) -> _core.StepResult:
    """The result of a step that was decided before the core was called."""
    return _core.StepResult((norm, 1.0, True, {}, None))


def _is_capturing() -> bool:
    """Whether what runs on a GPU now is put into a CUDA graph, so that nobody can wait for it."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def split(values: list[Any], groups: list[tuple[int, int]]) -> list[list[Any]]:
    """One list per group."""
    lists, begin = [], 0
    for _, count in groups:
        lists.append(values[begin : begin + count])
        begin += count
    return lists


class Shared:
    """What copies of an optimizer's attributes, as Lightning Fabric's wrapper has, have in common.

    Attributes:
        state: The dict behind `Optimizer.state`.
        ahead: The plan knows more than the dict.
        exposed: The dict may know more than the plan.
        bound: The plan, when there is one.
        observer: What takes norms in the backward pass.
        last: What the last step did.
        skipped_steps: Number of steps that were left out.
    """

    state: defaultdict[Any, Any]
    ahead = False
    exposed = False
    bound: Bound | None = None
    observer: Observer | None = None
    last: Result | None = None
    skipped_steps = 0


def _in_shared(name: str) -> Any:
    """An attribute of an optimizer that stands in `Shared`."""

    def assign(self: Any, value: Any) -> None:
        setattr(self._shared, name, value)

    return property(operator.attrgetter(f"_shared.{name}"), assign)


class Optimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` that clips, decays and updates in one pass; base of all classes.

    Attributes:
        param_groups: As torch has them, with its names. What is assigned there holds from the next
            step on.
        defaults: What `param_groups` have where they were not told otherwise.
        last (fusedstep.StepResult | None): What the last step did.
        on_nonfinite: As given to the constructor; may be changed between steps.
        grad_clip_scope: The same.
        skip_grad_norm: The same.
    """

    on_nonfinite: str
    grad_clip_scope: str
    skip_grad_norm: float | None
    master_weights: bool
    norm_in_backward: bool
    fused_unscale: bool | None
    last: Result | None = _in_shared("last")
    _state: defaultdict[Any, Any] = _in_shared("state")
    _ahead: bool = _in_shared("ahead")
    _exposed: bool = _in_shared("exposed")
    _bound: Bound | None = _in_shared("bound")
    _observer: Observer | None = _in_shared("observer")
    _skipped_steps: int = _in_shared("skipped_steps")

    form: ClassVar[type[fusedstep.Optimizer]]
    _form: ClassVar[Form]
    _pack: ClassVar[Packer]

    def __init_subclass__(cls, *, form: Form | None = None, **more: Any) -> None:
        super().__init_subclass__(**more)
        if form is None:  # a user's own subclass
            return
        cls.form, cls._form = form.optimizer, form
        cls._pack = staticmethod(form.optimizer._pack)
        cls.__init__ = make_initializer(cls, form)  # type: ignore[method-assign]
        cls.__doc__ = class_docstring(cls.__doc__ or "", form)

    def _set_up(self, params: Any, defaults: dict[str, Any], attributes: Mapping[str, Any]) -> None:
        if type(self) is Optimizer:
            raise TypeError("Optimizer is the base of the optimizers; use one of them")
        check_first(self._form, defaults)
        if attributes["norm_in_backward"] and attributes["fused_unscale"] is False:
            raise ValueError(
                "norm_in_backward: measures gradients before a scaler could unscale them, which "
                "fused_unscale=False leaves to it; set one of the two"
            )
        for name, value in attributes.items():
            setattr(self, name, value)
        self._start()
        type(self).form._policy(self)
        super().__init__(params, {**defaults, **self._form.fixed})
        if self.norm_in_backward:  # the hooks have to be there before the first backward pass
            with torch.no_grad():
                self._bind()

    def _start(self) -> None:
        """Attributes that neither a copy nor a state has."""
        self._shared = Shared()
        self._handle = compiled.register(self)

    # --- the step -----------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates all parameters that have a gradient, in place, in one call into the core.

        Args:
            closure: Computes the loss and the gradients again; called once, with gradients enabled.

        Returns:
            The loss that the closure returned; None without a closure. What the step did is in
            `last`.

        Raises:
            TypeError: If a gradient is sparse, or a parameter or gradient is of a kind that has no
                memory of its own.
            ValueError: If a hyper-parameter is out of range, or shapes or dtypes do not fit.
            FloatingPointError: With `on_nonfinite="raise"`, if a gradient holds inf or NaN.
            RuntimeError: If parameters are distributed, and another process refuses the step.
                A step that raises has changed nothing.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            # By way of the attribute, the compiler would make a graph for every learning rate.
            compiled.step(self._handle, vars(self)["param_groups"])
        else:
            self._advance()
        return loss

    def _advance(self, given: Mapping[int, Any] | None = None) -> None:
        """One step, with each parameter's `.grad`, or the gradients `given` by its id."""
        with torch.no_grad():
            try:
                self._attempt(given)
            except (TypeError, ValueError, BufferError) as error:
                bound = self._bound
                if bound is None:
                    raise
                if not bound.fits(self.param_groups, closely=True):
                    self._rebind()
                elif given is None and isinstance(error, BufferError) and bound.has_negated():
                    given = {id(leaf.param): leaf.param.grad for leaf in bound.leaves}
                else:
                    raise
                self._attempt(given)

    def _attempt(self, given: Mapping[int, Any] | None) -> None:
        scaling = amp.said_to(self)  # can take all processes, so ahead of what may raise
        policy = type(self).form._policy(self)
        try:
            bound = self._bind()
            grads = self._gradients(bound, given)
            rows = self._rows(bound)
        except Exception as error:
            distributed.tell(self.param_groups, policy, scaling, error)
            raise
        if scaling.unscaled and self._observer is not None:
            self._observer.forget()  # which no version counter tells
        if bound.sharded and grads is not None:
            self._finish(self._run_together(bound, grads, rows, policy, scaling))
        elif policy[0] == "raise" and scaling.overflow:  # of a scale, so no error of the user's
            self._finish(_left_out(None))
        else:
            self._finish(self._run(bound, grads, rows, policy, scaling=scaling))

    def _gradients(self, bound: Bound, given: Mapping[int, Any] | None) -> list[Any] | None:
        """The gradients of all leaves; None where the core reads them by itself."""
        if given is None and bound.direct:
            return None
        if bound.sharded:
            return distributed.gradients(bound.leaves, given)
        for leaf in bound.leaves:
            leaf.refresh()
        return [leaf.gradient(given) for leaf in bound.leaves]

    def _run(
        self,
        bound: Bound,
        grads: list[Any] | None,
        rows: list[tuple[int, _core.Row]],
        policy: _core.Policy,
        norm: float | None = None,
        scaling: amp.Scaling = amp.NOTHING,
    ) -> Result:
        """The call into the core, and what is to be done around it where it needs help."""
        trees = copies = None
        if grads is not None:
            trees = bound.per_group(grads)
            copies = bound.per_group([leaf.copy() for leaf in bound.leaves])
        try:
            observer = self._observer if grads is None else None
            observed = observer is not None and observer.complete(bound)
            result = bound.plan.step(
                trees, rows, policy, norm, copies, observed,
                found_inf=scaling.found_inf, grad_scale=scaling.grad_scale,
            )  # fmt: skip
        except (TypeError, ValueError, BufferError, RuntimeError, FloatingPointError) as error:
            self._explain(error)
            text = bound.spelled(str(error))
            if text == str(error):
                raise
            raise type(error)(text) from error
        # A GPU is not asked: where it skips the step, nothing of a leaf has changed.
        if grads is not None and not (result.settled and result.skipped):
            for leaf, grad in zip(bound.leaves, grads, strict=True):
                if grad is not None:
                    leaf.written()
        return result

    def _finish(self, result: Result) -> None:
        """Takes down what a step did; what a GPU did stays with it until somebody asks."""
        shared = self._shared
        shared.last = result
        decided = isinstance(result, _core.StepResult) or self._counts_by_itself()
        if decided and result.skipped:
            shared.skipped_steps += 1
            return
        shared.ahead = True
        if shared.exposed and (result.settled or not _is_capturing()):
            checkpoints.publish(self)  # somebody holds the state, and may look at it at any time

    def _rows(self, bound: Bound) -> list[tuple[int, _core.Row]]:
        """The row of each group."""
        rows = []
        for index, _ in bound.groups:
            group = self.param_groups[index]
            try:
                decay = plain("weight_decay", group["weight_decay"])
                rows.append(type(self)._pack(with_numbers(group), None, decay))
            except (TypeError, ValueError) as error:
                if len(self.param_groups) == 1:
                    raise
                raise type(error)(f"param_groups[{index}]: {error}") from None
        return rows

    def _run_together(
        self,
        bound: Bound,
        grads: list[Any],
        rows: list[tuple[int, _core.Row]],
        policy: _core.Policy,
        scaling: amp.Scaling,
    ) -> Result:
        """`_run` with what all processes decide alike, from numbers; see `distributed.agree`."""
        factor = scaling.factor
        rows = [(rule, (float(row[0]) * factor, *row[1:])) for rule, row in rows]

        def rehearse() -> None:
            self._run(bound, grads, rows, ("skip", "all", None), math.nan)

        try:
            norm, skip, policy = distributed.agree(
                bound.leaves, grads, rows, policy, scaling.overflow, rehearse
            )
        except (TypeError, ValueError, BufferError, RuntimeError) as error:
            self._explain(error)
            raise
        return _left_out(norm) if skip else self._run(bound, grads, rows, policy, norm)

    def _explain(self, error: Exception) -> None:
        """Names what torch's optimizers would take, or refuse in other words."""
        for index, group in enumerate(self.param_groups):
            for place, param in enumerate(group["params"]):
                grad = param.grad
                if grad is not None and grad.layout is not torch.strided:
                    layout = str(grad.layout).removeprefix("torch.")
                    raise TypeError(
                        f"param_groups[{index}]['params'][{place}].grad is {layout}; fusedstep "
                        "updates from dense gradients: make it dense (nn.Embedding(sparse=False)), "
                        "or give that parameter to torch.optim.SparseAdam"
                    ) from error

    # --- binding ------------------------------------------------------------------------------

    def _bind(self) -> Bound:
        """The plan over the parameters as they are now, with the state as it is in `state`."""
        bound = self._bound
        if bound is None or not bound.fits(self.param_groups, bound.watched):
            bound = self._rebind()
        if self._exposed:
            self._catch_up()  # with replays of a graph, which nobody tells of
            checkpoints.read(self, bound)
            self._exposed = checkpoints.is_held(self)
        return bound

    def _rebind(self) -> Bound:
        self._catch_up()
        self._take_counts()
        bound = self._make_bound()
        if self.norm_in_backward:
            self._observer = Observer(self._observer, bound)
        self._bound = bound
        self._exposed = True
        return bound

    def _make_bound(self) -> Bound:
        leaves: list[Leaf] = []
        groups, names = [], []
        seen: set[int] = set()
        for index, group in enumerate(self.param_groups):
            name = f"param_groups[{index}]['params']"
            before = len(leaves)
            for place, param in enumerate(group["params"]):
                if id(param) not in seen:  # tied
                    seen.add(id(param))
                    kept = self._state.get(param, {}).get(MASTER)
                    leaves.append(make_leaf(param, f"{name}[{place}]", self.master_weights, kept))
            if len(leaves) > before:
                groups.append((index, len(leaves) - before))
                names.append(name)
        lists = [(group["params"], tuple(group["params"])) for group in self.param_groups]
        direct = all(leaf.direct for leaf in leaves)
        sizes = [len(held) for _, held in lists]
        watched = not direct or self.master_weights or len(leaves) < sum(sizes) or 0 in sizes
        trees = split([leaf.target for leaf in leaves], groups)
        if not watched:  # the core sees at every step that its trees are what they were
            trees = [lists[index][0] for index, _ in groups]
        plan = _core.Plan(trees, names, type(self).form.declaration.slots)
        check_apart(leaves)
        return Bound(
            plan,
            leaves,
            groups,
            direct,
            any(leaf.sharded for leaf in leaves),
            lists,
            watched,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, as `torch.optim.Optimizer.add_param_group` does."""
        super().add_param_group(param_group)
        if not self.norm_in_backward or self._bound is None:
            return
        try:
            with torch.no_grad():
                self._rebind()
        except (TypeError, ValueError, BufferError):
            self.param_groups.pop()
            raise

    # --- state --------------------------------------------------------------------------------

    @property
    def state(self) -> defaultdict[Any, Any]:
        """The state of each parameter by torch's names, such as `state[param]["momentum_buffer"]`.

        Buffers are those that the step writes; counts (`step`, `mu_product`) are brought up to date
        when this attribute is read, which waits for a GPU that may have skipped steps, or replayed
        a graph. What is put here, changed or deleted holds from the next step on.
        """
        self._catch_up()
        self._exposed = True
        return self._state

    @state.setter
    def state(self, value: defaultdict[Any, Any]) -> None:
        self._state = value
        self._ahead = False
        self._exposed = True

    def state_dict(self) -> dict[str, Any]:
        """The state in the form of `torch.optim`, whose class of the same name can load it.

        Returns:
            dict: `state` (per parameter its buffers, live, and copies of its counts) and
            `param_groups`, as `torch.optim.Optimizer.state_dict` gives them.
        """
        hook = self.register_state_dict_post_hook(checkpoints.with_own_numbers, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a state dict of this class, or of the class of torch.optim of the same name.

        Buffers are copied, in the state's own dtype: float32 for 16-bit parameters, whatever dtype
        they were saved in. Hyper-parameters that the saved groups lack stay as they are, and so do
        those that the class settles (`nesterov` of `MomentumNesterov`).

        Raises:
            TypeError: If something else stands where a buffer or a number belongs.
            ValueError: If groups, shapes or numbers do not fit. Nothing has changed then.
        """
        hook = self.register_load_state_dict_pre_hook(checkpoints.hide_values)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        attributes = {name: vars(self)[name] for name in self._form.attributes}
        return {**super().__getstate__(), **attributes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        loading = "_shared" in vars(self)
        if loading:
            state = checkpoints.loaded(self, state)
            self._take_counts()
        else:
            self._start()
        own = state["state"]
        rest = {name: value for name, value in state.items() if name != "state"}
        super().__setstate__(rest)
        self.state = own
        self._bound = None

    # --- what one may ask ---------------------------------------------------------------------

    @property
    def grad_norm(self) -> Any:
        """Norm of all gradients of the last step before clipping, a 0-d float64 tensor; or None.

        Waits for a step on a GPU. The tensor is on the CPU.
        """
        norm = None if self.last is None else self.last.grad_norm
        return None if norm is None else torch.tensor(norm, dtype=torch.float64)

    @property
    def skipped_steps(self) -> int:
        """Number of steps that were left out for inf, NaN, an overflow or `skip_grad_norm`.

        Waits for a GPU that may have left out some.
        """
        self._take_counts()
        return self._skipped_steps

    def _counts_by_itself(self) -> bool:
        """Steps are counted here: the plan would count rehearsals, too."""
        return self._bound is not None and self._bound.sharded

    def _take_counts(self) -> None:
        """Adds what the plan has counted on a GPU, where steps are decided and graphs replayed."""
        if self._bound is not None:
            _, skipped = self._bound.plan.take_counts()
            self._skipped_steps += 0 if self._counts_by_itself() else skipped

    def _catch_up(self) -> None:
        """Brings the dict behind `state` up to date with the plan."""
        bound = self._bound
        if bound is not None and (self._ahead or bound.plan.unsure):
            checkpoints.publish(self)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Read by `GradScaler`: True leaves it to `step` to unscale gradients."""
        if self.norm_in_backward:  # norms are those of gradients that nobody has unscaled since
            return True
        if self.fused_unscale is not None:
            return bool(self.fused_unscale)
        keys = ("grad_clip_norm", "grad_clip_value")
        return any(group[key] is not None for group in self.param_groups for key in keys)
