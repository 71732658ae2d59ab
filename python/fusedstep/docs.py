"""Docstrings that follow from the declarations: the arguments of the classes, the functions."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from fusedstep import _core
from fusedstep.codegen import scalars_of
from fusedstep.hyperparameters import Hyperparameter

if TYPE_CHECKING:
    from fusedstep.base import Optimizer

# In the docstring of a class it stands for the arguments that the signature declares.
PLACEHOLDER = "The hyper-parameters of the signature."
_WIDTH = 100


def wrapped(text: str, indent: str, hang: int = 4) -> str:
    """One paragraph; `textwrap` would cost a millisecond of import time."""
    lines = [indent]
    for word in text.split():
        if len(lines[-1]) + 1 + len(word) > _WIDTH - 4:
            lines.append(indent + " " * (hang - 1))
        lines[-1] += word if lines[-1] == indent else f" {word}"
    return "\n".join(lines)


def _arguments(hypers: tuple[Hyperparameter, ...], indent: str) -> str:
    return "\n".join(wrapped(f"{hyper.name}: {hyper.doc}", indent) for hyper in hypers)


def class_docstring(text: str, hypers: tuple[Hyperparameter, ...]) -> str:
    """The docstring of a class with the place-holder replaced by the declared arguments."""
    found = re.search(rf"^( *){re.escape(PLACEHOLDER)}$", text, re.MULTILINE)
    if found is None:
        return text
    return text[: found.start()] + _arguments(hypers, found[1]) + text[found.end() :]


def sections(text: str) -> dict[str, str]:
    """The parts of a Google-style docstring by title; what comes before the first one is ''."""
    parts = re.split(r"^([A-Z]\w*):\n", inspect.cleandoc(text), flags=re.MULTILINE)
    return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


def optional_slots(rules: Iterable[str]) -> set[str]:
    """State buffers that not all of the rules keep."""
    kept = [set(_core.rules()[rule]["slots"]) for rule in rules]
    return set.union(*kept) - set.intersection(*kept)


_FUNCTION = """\
One step of `{class_name}` on arrays, in place.

{formula}Args:
    params: One array, or a tree of arrays (nested dict, list, tuple, any iterable), updated in
        place. Dense in any dimension order and writable; float32, float64, float16 or bfloat16.
    grads: The gradients: the same tree. Any strides and float dtype; a None leaves its
        parameter (and state) alone.
{slots}{scalars}{hypers}
    grad_norm: The norm of all gradients, before `rescale_grad`, if the caller has reduced it
        already (over processes or shards): sqrt of the sum of all `sum_squares(grads)`.
    param_copy: float16 or bfloat16 arrays that receive the new parameters, rounded once.
    found_inf: A number or an array of one element; not 0 skips the step, as a loss scaler asks.
    stream: For arrays on a GPU, the stream on which the step runs: a handle, or an object that
        has one. None: the one on which the parameters' library works now.

Returns:
    StepResult: `grad_norm`, `clip_coef`, `skipped`, `grad_norms`, and `state`, the dict to
    splat into the next call{state}.
    For arrays on a GPU a `DeviceStepResult` with the same attributes, which waits for the step
    when one of them is read.

Raises:
    TypeError: If an argument is of a wrong kind, a leaf is no array, or trees differ in form.
    ValueError: If a number is out of range, or shapes, dtypes or strides disagree.
    BufferError: If an array to be written is read-only or overlaps another one.
    RuntimeError: If arrays are on a GPU that cannot be used.
    FloatingPointError: With `on_nonfinite="raise"`, if a gradient holds inf or NaN.
        A call that raises has changed nothing. Messages name the argument, path and value.

{rest}"""

_SLOT = """\
    {slot}: The state: the same tree, float32 or of its parameter's dtype, with the
        parameter's strides. None (or None leaves): this is the first step, and the parameter's
        own library makes it{when}.
"""


def function_docstring(optimizer: type[Optimizer]) -> str:
    """The docstring of the functional step, from that of the class."""
    declaration, parts = optimizer.declaration, sections(optimizer.__doc__ or "")
    formula = parts[""].partition(".. math::")[2].strip("\n")
    slots, scalars = declaration.function_slots, scalars_of(declaration)
    optional = optional_slots(declaration.function_rules)
    state = [*slots, *(scalar.name for scalar in scalars)]
    titles = {"Numerics": "Numerics", "Function": "Example", "References": "References"}
    rest = [f"{new}:\n{parts[old].rstrip()}\n" for old, new in titles.items() if old in parts]
    return _FUNCTION.format(
        class_name=declaration.class_name,
        formula=f".. math::\n{formula}\n\n" if formula else "",
        slots="".join(
            _SLOT.format(slot=slot, when=" where its form keeps one" if slot in optional else "")
            for slot in slots
        ),
        scalars="".join(f"{_arguments((scalar,), '    ')}\n" for scalar in scalars),
        hypers=_arguments(declaration.of_function(), "    "),
        state=f" (`{'`, `'.join(state)}`)" if state else " (empty: the rule keeps none)",
        rest="\n".join(rest),
    )
