"""Docstrings that follow from the declarations: the arguments of the classes, the functions."""

from __future__ import annotations

import inspect
import re

from fusedstep.codegen import Declaration
from fusedstep.hyperparameters import Hyperparameter

PLACEHOLDER = "The hyper-parameters of the signature."


def _entry(name: str, text: str, indent: str) -> str:
    return f"{indent}{name}: " + text.replace("\n", f"\n{indent}    ")


def _arguments(hypers: tuple[Hyperparameter, ...], indent: str) -> str:
    return "\n".join(_entry(hyper.name, hyper.doc, indent) for hyper in hypers)


def class_docstring(text: str, hypers: tuple[Hyperparameter, ...]) -> str:
    """The docstring of a class with the place-holder replaced by the declared arguments."""
    found = re.search(rf"^( *){re.escape(PLACEHOLDER)}$", text, re.MULTILINE)
    if found is None:
        return text
    return text[: found.start()] + _arguments(hypers, found[1]) + text[found.end() :]


def sections(text: str) -> dict[str, str]:
    """The parts of a Google-style docstring by title; what comes before the first one is ''."""
    parts = re.split(r"^([A-Z][\w ]*):\n", inspect.cleandoc(text), flags=re.MULTILINE)
    return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


_FUNCTION = '''\
One step of `{class_name}` on arrays, in place.

{formula}Args:
    params: One array, or a tree of arrays (nested dict, list, tuple, any iterable), updated in
        place. Dense in any dimension order, writable, of one of the dtypes float32, float64,
        float16 and bfloat16 each.
    grads: The gradients: the same tree. Any strides and float dtype; a None leaves its
        parameter (and state) alone.
{slots}{hypers}
    grad_norm: The norm of all gradients, before `rescale_grad`, if the caller has reduced it
        already (over processes or shards): sqrt of the sum of all `sum_squares(grads)`.
    param_copy: float16 or bfloat16 arrays that receive the new parameters, rounded once.

Returns:
    StepResult: `grad_norm`, `clip_coef`, `skipped` and `state`, the dict to splat into the next
    call{state_keys}.

Raises:
    TypeError: If an argument is of a wrong kind, a leaf is no array, or trees differ in form.
    ValueError: If a number is out of range, or shapes, dtypes or strides disagree.
    BufferError: If an array to be written is read-only or overlaps another one.
    FloatingPointError: With `on_nonfinite="raise"`, if a gradient holds inf or NaN.
        A call that raises has changed nothing. Messages name the argument, path and value.

{rest}'''

_SLOT = """\
    {slot}: The state: the same tree, float32 or like its parameter, with the parameter's strides.
        None (or None leaves): the first step; it is made by the parameter's own library.
"""


def function_docstring(declaration: Declaration, class_text: str) -> str:
    """The docstring of the functional step, from that of the class."""
    parts = sections(class_text)
    formula = parts[""].partition(".. math::")[2]
    slots = declaration.function_slots
    rest = {"Numerics": "Numerics", "Function": "Example", "References": "References"}
    return _FUNCTION.format(
        class_name=declaration.class_name,
        formula=f".. math::{formula.rstrip()}\n\n" if formula else "",
        slots="".join(_SLOT.format(slot=slot) for slot in slots),
        hypers=_arguments(declaration.of_function(), "    "),
        state_keys=f" (`{'`, `'.join(slots)}`)" if slots else " (empty: the rule has none)",
        rest="\n".join(f"{new}:\n{parts[old]}".rstrip() + "\n" for old, new in rest.items() if old in parts),
    )
