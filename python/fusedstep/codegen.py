"""Functions made from the declarations, once per class at import, as `dataclasses` makes methods.

A functional step is the place where every 100 ns count: unrolled checks in a function of its own
cost a third of a loop over a table. The text of each function is short and the same for all rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, NoReturn, SupportsFloat, SupportsInt

from fusedstep import _core
from fusedstep.hyperparameters import Hyperparameter, given_norm, in_function
from fusedstep.ranges import Check, Count, Real
from fusedstep.scheduled import READ_THERE, Scheduled, for_step

# A row begins with what all rules share; see `_core.Row`.
ROW_HEAD = ("rescale_grad", "maximize", "grad_clip_norm", "grad_clip_value")
# Arguments of the call as a whole, in the order of `_core.Policy`: they are in no row and no group.
CALL_WIDE = ("on_nonfinite", "grad_clip_scope", "skip_grad_norm")
# State that is a number: its check, the value before the first step, and what it means.
SCALARS: dict[str, tuple[Check, Any, str]] = {
    "step": (
        Count(0, 2**62),
        0,
        "Number of steps applied before this one, for all arrays of the call, >= 0. Or an array of "
        "one number on the device of the parameters, which a step that is applied advances there.",
    ),
    "mu_product": (
        Real(0.0, 1.0, "[]"),
        1.0,
        "Product of the momenta mu_t of the steps before this one, in [0, 1]. An array, like "
        "`step`, if `step` is one.",
    ),
}


class Declaration(NamedTuple):
    """What an optimizer class says about itself; everything else is derived from it."""

    class_name: str
    function: str  # name of its functional step
    rules: Mapping[str, str]  # compiled rules, and when each applies: the first that does
    function_rules: tuple[str, ...]  # those of the functional step
    hypers: tuple[Hyperparameter, ...]
    derived: Mapping[
        str, str
    ]  # a rule's other hyper-parameters, as Python expressions of the hypers

    @property
    def slots(self) -> tuple[str, ...]:
        """State buffers of its objects, by name."""
        return _union(self.rules, "slots")

    @property
    def function_slots(self) -> tuple[str, ...]:
        """State buffers of its functional step, by name."""
        return _union(self.function_rules, "slots")

    @property
    def scalars(self) -> tuple[str, ...]:
        """State that is a number, by name."""
        return _union(self.rules, "scalars")

    def of_group(self) -> tuple[Hyperparameter, ...]:
        """The hyper-parameters that a param group may set."""
        return tuple(hyper for hyper in self.hypers if hyper.name not in CALL_WIDE)

    def of_call(self) -> tuple[Hyperparameter, ...]:
        """The hyper-parameters of a step as a whole."""
        return tuple(hyper for hyper in self.hypers if hyper.name in CALL_WIDE)

    def of_function(self) -> tuple[Hyperparameter, ...]:
        """The hyper-parameters of the function: those its rules read, or its choice of one."""
        read = _union(self.function_rules, "hypers")
        texts = [self.derived[name] for name in read if name in self.derived]
        if len(self.function_rules) > 1:
            texts += [self.rules[rule] for rule in self.function_rules]
        used = {*ROW_HEAD, *CALL_WIDE, *read, *_names_in(texts)}
        return tuple(in_function(hyper) for hyper in self.hypers if hyper.name in used)


def _union(rules: Iterable[str], entry: str) -> tuple[str, ...]:
    """What rules have under `entry`, each once, in their order."""
    return tuple(dict.fromkeys(name for rule in rules for name in _core.rules()[rule][entry]))


def _names_in(expressions: Iterable[str]) -> set[str]:
    return {name for text in expressions for name in compile(text, "", "eval").co_names}


# --- parts of the texts -----------------------------------------------------------------------


def _row_text(declaration: Declaration, rule: str) -> str:
    names = {hyper.name for hyper in declaration.hypers} - {"next_momentum"}
    wanted = (*ROW_HEAD, *_core.rules()[rule]["hypers"])
    other = {**declaration.derived, "next_momentum": "coming", "next_beta1": "coming"}
    return ", ".join(name if name in names else f"({other[name]})" for name in wanted)


def _check_text(hyper: Hyperparameter, argument: str = "") -> str:
    name, check = hyper.name, hyper.check
    more = argument if argument and isinstance(check, Scheduled) else ""
    call = f"check_{name}.at(" if more else f"check_{name}("
    if name in READ_THERE:
        call = f"for_step(check_{name}, "
    # A default that nobody touched is the same object; this test costs a third of a range check.
    return (
        f"    if {name} is not default_{name} and not ({check.accepts(name)}):\n"
        f"        {name} = {call}{name!r}, {name}{more})\n"
    )


# `coming` is the momentum of the step after this one, which only a look-ahead asks for: a function
# of t may end with the last step. `varies`: a buffer is needed even where the momentum is 0 just
# now. Both are read off before `momentum` itself becomes a number.
_MOMENTUM = """\
    coming = {given}
    varies = bool(coming)
    if type(momentum) is not float:
        varies = varies or check_momentum.varies(momentum)
        if coming is None and ({looks_ahead}):
            coming = check_momentum.coming('momentum', momentum{argument})
{check}    if coming is None:
        coming = momentum
"""


# The same for NAdam, whose momentum is the first of `betas`.
_BETAS = """\
    coming = None
    if betas is not default_betas and not ({accepts}):
        given = betas
        betas = check_betas{at}('betas', given{argument})
        coming = check_betas.coming('betas', given{argument})
    if coming is None:
        coming = betas[0]
"""


def _checks_text(
    declaration: Declaration, hypers: tuple[Hyperparameter, ...], argument: str = ""
) -> str:
    """The checks of all arguments; `momentum` comes last, and with it what follows from it."""
    names = {hyper.name for hyper in hypers}
    nadam = "next_beta1" in _union(declaration.rules, "hypers")
    apart = {"momentum", "betas"} if nadam else {"momentum"}
    texts = [_check_text(hyper, argument) for hyper in hypers if hyper.name not in apart]
    for betas in (hyper for hyper in hypers if hyper.name in apart - {"momentum"}):
        at = ".at" if argument else ""
        accepts = betas.check.accepts("betas")
        texts.append(_BETAS.format(accepts=accepts, at=at, argument=argument))
    for momentum in (hyper for hyper in hypers if hyper.name == "momentum"):
        looks_ahead = (
            "nesterov" if "nesterov" in names else declaration.derived.get("nesterov", "False")
        )
        text = _MOMENTUM.format(
            given="next_momentum" if "next_momentum" in names else "None",
            looks_ahead=looks_ahead,
            argument=argument,
            check=_check_text(momentum, argument),
        )
        texts.append(text)
    return "".join(texts)


def _choice_text(
    declaration: Declaration, rules: tuple[str, ...], use: Callable[[str], str]
) -> str:
    """`use(rule)` under the condition of each rule; of the last one always."""
    text = ""
    for rule in rules[:-1]:
        body = "".join(f"    {line}\n" for line in use(rule).splitlines())
        text += f"    if {declaration.rules[rule]}:\n{body}"
    return text + use(rules[-1])


def _constants(hypers: tuple[Hyperparameter, ...]) -> dict[str, Any]:
    constants: dict[str, Any] = {"inf": math.inf, "for_step": for_step}
    for hyper in hypers:
        constants[f"check_{hyper.name}"] = hyper.check
        constants[f"default_{hyper.name}"] = hyper.default
    return constants


def _compile(name: str, text: str, constants: dict[str, Any], module: dict[str, Any]) -> Any:
    """The function `name` of `text`, with the constants as closure: quicker than globals."""
    lines = "".join(f"    {line}\n" for line in text.splitlines())
    factory = f"def make({', '.join(constants)}):\n{lines}    return {name}\n"
    found: dict[str, Any] = {}
    exec(compile(factory, f"<fusedstep {name}>", "exec"), module, found)
    return found["make"](**constants)


# --- functional steps -------------------------------------------------------------------------

_STEP = """\
def {name}({arguments}):
{checks}    if grad_norm is not None:
        grad_norm = given_norm(grad_norm)
{choice}"""

_UNUSED = """\
    if {slot} is not None:
        refuse_state({name!r}, {slot!r})
"""
_CALL = """\
{unused}    return core_step({rule}, params, grads, ({states}), ({scalars}), ({row}), ({policy}), \
grad_norm, param_copy, found_inf, stream)
"""


def _refuse_state(function: str, slot: str) -> NoReturn:
    raise ValueError(f"{slot}: {function} keeps no such state with these arguments")


def make_step(
    declaration: Declaration, docstring: str, module: dict[str, Any]
) -> Callable[..., _core.StepResult | _core.DeviceStepResult]:
    """The functional step of a class; `module` is the namespace it is defined in."""
    rules, slots = declaration.function_rules, declaration.function_slots
    hypers, scalars = declaration.of_function(), scalars_of(declaration)

    def use(rule: str) -> str:
        own = _core.rules()[rule]["slots"]
        unused = [_UNUSED.format(slot=slot, name=declaration.function) for slot in slots]
        return _CALL.format(
            unused="".join(
                text for slot, text in zip(slots, unused, strict=True) if slot not in own
            ),
            rule=_core.rules()[rule]["index"],
            states="".join(f"{slot}, " for slot in own),
            scalars="".join(f"{scalar.name}, " for scalar in scalars),
            row=_row_text(declaration, rule),
            policy=", ".join(CALL_WIDE),
        )

    keywords = [h.name if h.name == "lr" else f"{h.name}=default_{h.name}" for h in hypers]
    arguments = [
        *("params", "grads", *(f"{slot}=None" for slot in slots)),
        *(f"{scalar.name}=default_{scalar.name}" for scalar in scalars),
        *("*", *keywords, "grad_norm=None", "param_copy=None", "found_inf=None", "stream=None"),
    ]
    text = _STEP.format(
        name=declaration.function,
        arguments=", ".join(arguments),
        checks=_checks_text(declaration, (*scalars, *hypers)),
        choice=_choice_text(declaration, rules, use),
    )
    constants = _constants((*scalars, *hypers))
    constants |= {"core_step": _core.step, "given_norm": given_norm, "refuse_state": _refuse_state}
    function = _compile(declaration.function, text, constants, module)
    function.__module__ = module["__name__"]
    function.__qualname__ = declaration.function
    function.__doc__ = docstring
    function.__annotations__ = step_annotations(declaration)
    return function  # type: ignore[no-any-return]


def scalars_of(declaration: Declaration) -> tuple[Hyperparameter, ...]:
    """The arguments of the functional step that are state, but numbers."""
    names = _union(declaration.function_rules, "scalars")
    scalars = [(name, *SCALARS[name]) for name in names]
    kinds: dict[type, Any] = {int: SupportsInt, float: SupportsFloat}
    return tuple(
        Hyperparameter(
            name, kinds[type(default)].__name__, kinds[type(default)], check, doc, default
        )
        for name, check, default, doc in scalars
    )


def step_annotations(declaration: Declaration) -> dict[str, Any]:
    """Annotations of a functional step, in the order of its arguments."""
    trees = dict.fromkeys(("params", "grads", *declaration.function_slots), Any)
    hypers = (*scalars_of(declaration), *declaration.of_function())
    given = {hyper.name: hyper.annotation for hyper in hypers}
    last = {
        "grad_norm": SupportsFloat | None,
        "param_copy": Any,
        "found_inf": SupportsFloat | None,
        "stream": Any,
        "return": _core.StepResult | _core.DeviceStepResult,
    }
    return trees | given | last


# --- what objects use -------------------------------------------------------------------------

Packer = Callable[[Mapping[str, Any], int | None, float], tuple[int, tuple[Any, ...]]]

_PACKER = """\
def pack(group, t, weight_decay):
{reads}{checks}{choice}"""


def make_packer(declaration: Declaration) -> Packer:
    """Checks a param group and packs it as a row: `(rule index, row)` of `_core.Plan.step`.

    `t` is the number of applied steps (None refuses functions of it), `weight_decay` a number where
    the group holds a function.
    """
    hypers = declaration.of_group()
    reads = [f"    {h.name} = group[{h.name!r}]\n" for h in hypers if h.name != "weight_decay"]

    def use(rule: str) -> str:
        return f"    return {_core.rules()[rule]['index']}, ({_row_text(declaration, rule)})\n"

    text = _PACKER.format(
        reads="".join(reads),
        checks=_checks_text(declaration, hypers, ", t"),
        choice=_choice_text(declaration, tuple(declaration.rules), use),
    )
    return _compile("pack", text, _constants(hypers), {})  # type: ignore[no-any-return]


_POLICY = """\
def policy(optimizer):
{reads}{checks}    return {values}
"""


def make_policy(declaration: Declaration) -> Callable[[Any], _core.Policy]:
    """Checks the attributes of an optimizer that concern a step as a whole, and packs them."""
    hypers = declaration.of_call()
    text = _POLICY.format(
        reads="".join(f"    {hyper.name} = optimizer.{hyper.name}\n" for hyper in hypers),
        checks="".join(_check_text(hyper) for hyper in hypers),
        values=", ".join(CALL_WIDE),
    )
    return _compile("policy", text, _constants(hypers), {})  # type: ignore[no-any-return]
