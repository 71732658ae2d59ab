"""Functions made from the declarations, once per class at import, as `dataclasses` makes methods.

A functional step is the place where every 100 ns count: unrolled checks in a function of its own
cost a third of a loop over a table. The text of each function is short and the same for all rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fusedstep import _core
from fusedstep.hyperparameters import Hyperparameter, given_norm, in_function

# A row begins with what all rules share; see `_core.Row`.
ROW_HEAD = ("rescale_grad", "maximize", "grad_clip_norm", "grad_clip_value")
# Arguments of the call as a whole: they are in no row and in no param group.
CALL_WIDE = ("on_nonfinite",)


class Declaration(NamedTuple):
    """What an optimizer class says about itself; everything else is derived from it."""

    class_name: str
    function: str  # name of its functional step
    rules: tuple[str, ...]  # compiled rules it uses; the first is the function's
    hypers: tuple[Hyperparameter, ...]
    fixed: Mapping[str, str]  # a rule's other hyper-parameters, as Python expressions of the hypers

    @property
    def slots(self) -> tuple[str, ...]:
        """State buffers of its objects, by name."""
        rules = _core.rules()
        return max((tuple(rules[rule]["slots"]) for rule in self.rules), key=len)

    @property
    def function_slots(self) -> tuple[str, ...]:
        """State buffers of its functional step, by name."""
        return tuple(_core.rules()[self.rules[0]]["slots"])

    def of_group(self) -> tuple[Hyperparameter, ...]:
        """The hyper-parameters that a param group may set."""
        return tuple(hyper for hyper in self.hypers if hyper.name not in CALL_WIDE)

    def of_function(self) -> tuple[Hyperparameter, ...]:
        """The hyper-parameters of the function: those its rule reads."""
        rule = _core.rules()[self.rules[0]]
        used = {*ROW_HEAD, *CALL_WIDE, *rule["hypers"]}
        return tuple(in_function(hyper) for hyper in self.hypers if hyper.name in used)


def _row_text(declaration: Declaration, rule: str) -> str:
    names = {hyper.name for hyper in declaration.hypers}
    wanted = (*ROW_HEAD, *_core.rules()[rule]["hypers"])
    values = [name if name in names else f"({declaration.fixed[name]})" for name in wanted]
    # A `next_momentum` of None stands for the momentum itself, in every rule that has one.
    coming = "momentum if next_momentum is None else next_momentum"
    return ", ".join(coming if value == "next_momentum" else value for value in values)


def _check_text(hyper: Hyperparameter, indent: str) -> str:
    name = hyper.name
    # A default that nobody touched is the same object; this test costs a third of a range check.
    return (
        f"{indent}if {name} is not default_{name} and not ({hyper.check.accepts(name)}):\n"
        f"{indent}    {name} = check_{name}({name!r}, {name})\n"
    )


def _constants(hypers: tuple[Hyperparameter, ...]) -> dict[str, Any]:
    constants: dict[str, Any] = {"inf": math.inf}
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


_STEP = """\
def {name}({arguments}):
{checks}    if grad_norm is not None:
        grad_norm = given_norm(grad_norm)
    return step({rule}, params, grads, ({states}), ({row}), on_nonfinite, grad_norm, param_copy)
"""


def make_step(
    declaration: Declaration, docstring: str, module: dict[str, Any]
) -> Callable[..., _core.StepResult]:
    """The functional step of a class; `module` is the namespace it is defined in."""
    rule = declaration.rules[0]
    hypers = declaration.of_function()
    slots = declaration.function_slots
    keywords = [
        hyper.name if hyper.name == "lr" else f"{hyper.name}=default_{hyper.name}"
        for hyper in hypers
    ]
    arguments = [
        *("params", "grads", *(f"{slot}=None" for slot in slots), "*", *keywords),
        *("grad_norm=None", "param_copy=None"),
    ]
    text = _STEP.format(
        name=declaration.function,
        arguments=", ".join(arguments),
        checks="".join(_check_text(hyper, "    ") for hyper in hypers),
        rule=_core.rules()[rule]["index"],
        states="".join(f"{slot}, " for slot in slots),
        row=_row_text(declaration, rule),
    )
    constants = _constants(hypers) | {"step": _core.step, "given_norm": given_norm}
    function = _compile(declaration.function, text, constants, module)
    function.__module__ = module["__name__"]
    function.__qualname__ = declaration.function
    function.__doc__ = docstring
    function.__annotations__ = step_annotations(hypers, slots)
    return function  # type: ignore[no-any-return]


def step_annotations(hypers: tuple[Hyperparameter, ...], slots: tuple[str, ...]) -> dict[str, Any]:
    """Annotations of a functional step, in the order of its arguments."""
    trees = dict.fromkeys(("params", "grads", *slots), Any)
    given = {hyper.name: hyper.annotation for hyper in hypers}
    last = {"grad_norm": float | None, "param_copy": Any, "return": _core.StepResult}
    return trees | given | last


Packer = Callable[[Mapping[str, Any], float, float], tuple[int, tuple[Any, ...]]]

_PACKER = """\
def pack(group, lr, weight_decay):
{reads}{checks}    return {rule}, ({row})
"""


def make_packer(declaration: Declaration, rule: str) -> Packer:
    """Checks a param group and packs it as a row: `(rule index, row)` of `_core.Plan.step`.

    `lr` and `weight_decay` are passed beside the group, which may hold a schedule or a function.
    """
    hypers = declaration.of_group()
    passed = ("lr", "weight_decay")
    reads = [f"    {h.name} = group[{h.name!r}]\n" for h in hypers if h.name not in passed]
    text = _PACKER.format(
        reads="".join(reads),
        checks="".join(_check_text(hyper, "    ") for hyper in hypers),
        rule=_core.rules()[rule]["index"],
        row=_row_text(declaration, rule),
    )
    return _compile("pack", text, _constants(hypers), {})  # type: ignore[no-any-return]
