"""Writes `functional.pyi`: the functional steps as type checkers and editors read them.

After a change of an optimizer's signature or docstring, with the changed package installed, run
`python -m fusedstep._stubs python/fusedstep/functional.pyi`. It is in sync if it equals `stub()`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from fusedstep.base import Optimizer
from fusedstep.codegen import scalars_of
from fusedstep.docs import function_docstring
from fusedstep.hyperparameters import Hyperparameter

_HEAD = '''\
"""Signatures of the functional steps; written by `python -m fusedstep._stubs`."""

from typing import Any, SupportsFloat, SupportsInt

from fusedstep._core import DeviceStepResult, StepResult
from fusedstep.hyperparameters import (
{names}
)
'''

_FUNCTION = """
def {name}(
    {arguments},
) -> StepResult | DeviceStepResult:
{docstring}
"""


def quoted(docstring: str) -> str:
    """A docstring as it stands in the body of a class or function of a stub."""
    lines = [f'r"""{docstring.rstrip()}', '"""']
    return "\n".join(f"    {line}" if line else "" for text in lines for line in text.split("\n"))


def with_default(name: str, annotation: str, default: object) -> str:
    """One argument, in the quotes of the house."""
    return f"{name}: {annotation} = {default!r}".replace("'", '"')


def listed(names: Iterable[str]) -> str:
    """Imported names, one a line."""
    return "\n".join(f"    {name}," for name in sorted(names))


def _argument(hyper: Hyperparameter) -> str:
    # `lr` has a default in the classes only: a call says what it does.
    if hyper.name == "lr":
        return f"{hyper.name}: {hyper.alias}"
    return with_default(hyper.name, hyper.alias, hyper.default)


def _function(optimizer: type[Optimizer]) -> str:
    declaration = optimizer.declaration
    arguments = [
        *("params: Tree", "grads: Tree"),
        *(f"{slot}: Tree = None" for slot in declaration.function_slots),
        *(f"{s.name}: {s.alias} = {s.default!r}" for s in scalars_of(declaration)),
        "*",
        *(_argument(hyper) for hyper in declaration.of_function()),
        *("grad_norm: SupportsFloat | None = None", "param_copy: Tree = None"),
        *("found_inf: SupportsFloat | None = None", "stream: Any = None"),
    ]
    return _FUNCTION.format(
        name=declaration.function,
        arguments=",\n    ".join(arguments),
        docstring=quoted(function_docstring(optimizer)),
    )


def stub() -> str:
    """The text of the stub."""
    import fusedstep.functional  # noqa: F401  (the classes register themselves)

    optimizers = Optimizer.__subclasses__()
    names = {hyper.alias for kind in optimizers for hyper in kind.declaration.of_function()}
    return _HEAD.format(names=listed(names | {"Tree"})) + "".join(map(_function, optimizers))


def write(text: str, default: Path) -> None:
    """Writes a stub to the path that the command line gives, else to `default`."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    target.write_text(text)


if __name__ == "__main__":
    write(stub(), Path(__file__).with_name("functional.pyi"))
