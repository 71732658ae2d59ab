"""Docstrings of the classes: what the declarations say, in torch's names."""

from __future__ import annotations

from typing import NamedTuple

from fusedstep.docs import optional_slots, sections, wrapped
from fusedstep.torch.signatures import Extra, Form


class Argument(NamedTuple):
    """One argument of a constructor, as readers and type checkers see it."""

    name: str
    annotation: str
    default: object
    doc: str
    positional: bool


# What differs from the declarations: numbers stand in the param groups, as torch keeps them, where
# torch's schedulers change them.
_IN_GROUPS = {
    "lr": (
        "float | Tensor",
        "Learning rate, >= 0. A number, or a tensor of one, which is read at every step; on the "
        "GPU of the parameters by that GPU, so that nobody waits, and nobody checks its range.",
    ),
    "momentum": (
        "float | Tensor",
        "Share of the velocity that a step keeps, in [0, 1), dimensionless. A number, or a tensor "
        "of one, which is read at every step.",
    ),
    "betas": (
        "tuple[float | Tensor, float | Tensor]",
        "Decay rates of the averages of the gradient and of its square, each in [0, 1).",
    ),
    "weight_decay": (
        "float | Tensor",
        "Decay coefficient, >= 0, added to the gradient after clipping (L2).",
    ),
    "rescale_grad": (
        "float | Tensor",
        "Multiplies every gradient before anything else is done with it, finite. A number, or a "
        "tensor of one, which is read as that of `lr` is.",
    ),
    "next_momentum": (
        "float | None",
        "The momentum of the coming step, in [0, 1), which the look-ahead of Nesterov's form uses "
        "when the momentum changes from step to step. None: the same as `momentum`, as in torch.",
    ),
}
_DECOUPLED = "Decay coefficient, >= 0: a step subtracts `lr * weight_decay` of the parameter."

_BUFFERS = {
    "momentum_buffer": "The velocity v",
    "exp_avg": "The average m of the gradient",
    "exp_avg_sq": "The average s of the gradient's square",
    "max_exp_avg_sq": "The largest s so far",
    "square_avg": "The average s of the gradient's square",
    "grad_avg": "The average a of the gradient",
}
_NUMBERS = {
    "step": "The number t of steps that were applied to the parameter, a tensor on the CPU.",
    "mu_product": "The product M of the momenta so far, a float64 tensor on the CPU.",
}
_MASTER = "The float32 master of a 16-bit parameter, with `master_weights`."


def arguments(form: Form) -> list[Argument]:
    """All arguments of the constructor after `params`, in their order."""
    found = []
    for name, argument in form.arguments().items():
        if isinstance(argument, Extra):
            annotation, doc = argument.annotation, argument.doc
        else:
            annotation, doc = _IN_GROUPS.get(name, (argument.alias, argument.doc))
        if name == "weight_decay" and form.fixed.get("decoupled_weight_decay"):
            doc = _DECOUPLED
        found.append(Argument(name, annotation, argument.default, doc, name in form.positional))
    return found


def _state(form: Form) -> dict[str, str]:
    """What `Optimizer.state` holds for a parameter."""
    optional = optional_slots(form.optimizer.declaration.rules)
    state = {}
    for slot, name in form.buffers.items():
        when = ", where the form keeps it" if slot in optional else ""
        state[name] = f"{_BUFFERS[name]}{when}."
    return state | {name: _NUMBERS[name] for name in form.scalars} | {"master_param": _MASTER}


_CLASS = """\
{summary}{formula}
Args:
    params: Parameters, pairs of name and parameter, or dicts of param groups, as for
        `torch.optim.Optimizer`. float32, float64, float16, bfloat16, complex64 or complex128.
        One that occurs twice is updated once.
{arguments}

State:
{state}

    Tensors have the strides, the sharding and the device of their parameter, and its dtype, but
    float32 for a float16 or bfloat16 one. Counts are brought up to date when `state` or
    `state_dict` is read.

Raises:
    TypeError: If an argument is of a wrong kind; the message names it and what it was.
    ValueError: If a hyper-parameter is out of range or does not go with another one, or
        `differentiable` is True; from torch, if `params` is empty.

{rest}"""


def class_docstring(text: str, form: Form) -> str:
    """The docstring of a class.

    Args:
        text: What the class says about itself: the summary, and sections of its own (`Example`).
        form: The formula, the numerics and the references are those of its optimizer.
    """
    own, core = sections(text), sections(form.optimizer.__doc__ or "")
    parts = {**core, **own}
    titles = ("Numerics", "Example", "References")
    return _CLASS.format(
        summary=own[""].rstrip() + "\n\n",
        formula=core[""].partition("\n\n")[2].rstrip() + "\n",
        arguments="\n".join(wrapped(f"{a.name}: {a.doc}", "    ") for a in arguments(form)),
        state="\n".join(
            wrapped(f"- `{name}`: {doc}", "    ", hang=2) for name, doc in _state(form).items()
        ),
        rest="\n".join(
            f"{title}:\n{parts[title].rstrip()}\n" for title in titles if title in parts
        ),
    )
