"""Writes `functional.pyi`, the signatures of the functional steps as type checkers read them.

Run `python -m fusedstep._stubs` after a change of an optimizer's signature.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fusedstep.base import Optimizer
from fusedstep.codegen import Declaration
from fusedstep.hyperparameters import Hyperparameter

_HEAD = '''\
"""Signatures of the functional steps; written by `python -m fusedstep._stubs`."""

from fusedstep._core import StepResult
from fusedstep.hyperparameters import (
{names}
)
'''

_FUNCTION = """
def {name}(
    {arguments},
) -> StepResult: ...
"""


def _argument(hyper: Hyperparameter) -> str:
    # `lr` has a default in the classes only: a call says what it does.
    default = "" if hyper.name == "lr" else f" = {hyper.default!r}"
    return f"{hyper.name}: {hyper.alias}{default}".replace("'", '"')


def _function(declaration: Declaration) -> str:
    arguments = [
        *("params: Tree", "grads: Tree"),
        *(f"{slot}: Tree = None" for slot in declaration.function_slots),
        "*",
        *(_argument(hyper) for hyper in declaration.of_function()),
        *("grad_norm: float | None = None", "param_copy: Tree = None"),
    ]
    return _FUNCTION.format(name=declaration.function, arguments=",\n    ".join(arguments))


def stub(optimizers: list[type[Optimizer]]) -> str:
    """The text of the stub."""
    declarations = [optimizer.declaration for optimizer in optimizers]
    names = {hyper.alias for d in declarations for hyper in d.of_function()} | {"Tree"}
    head = _HEAD.format(names="\n".join(f"    {name}," for name in sorted(names)))
    return head + "".join(map(_function, declarations))


def main() -> None:
    """Writes the stub beside this file, or to the path given."""
    import fusedstep.optimizers  # noqa: F401  (registers the classes)

    default = Path(__file__).with_name("functional.pyi")
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    target.write_text(stub(Optimizer.__subclasses__()))


if __name__ == "__main__":
    main()
