"""Writes `constructors.pyi`: the transforms' signatures as type checkers and editors read them.

After a change of an optimizer's signature, with the changed package installed, run
`python -m fusedstep.jax._stubs python/fusedstep/jax/constructors.pyi`.
"""

from __future__ import annotations

from pathlib import Path

from fusedstep._stubs import listed, quoted, with_default, write
from fusedstep.base import Optimizer
from fusedstep.hyperparameters import Hyperparameter
from fusedstep.jax.docs import docstring, name_of

_HEAD = '''\
"""Signatures of the transforms; written by `python -m fusedstep.jax._stubs`."""

from typing import Any

from fusedstep.hyperparameters import (
{names}
)
from fusedstep.jax.transform import Transform
'''

_FUNCTION = """
def {name}(
    {arguments},
) -> Transform:
{docstring}
"""


def _argument(hyper: Hyperparameter) -> str:
    # A number may be an array, which only the device knows; `Any` is what JAX's types are here.
    number = "" if isinstance(hyper.default, (bool, str)) else " | Any"
    return with_default(hyper.name, f"{hyper.alias}{number}", hyper.default)


def _function(kind: type[Optimizer]) -> str:
    lead, *rest = kind.declaration.hypers
    return _FUNCTION.format(
        name=name_of(kind),
        arguments=",\n    ".join([_argument(lead), "*", *map(_argument, rest)]),
        docstring=quoted(docstring(kind)),
    )


def stub() -> str:
    """The text of the stub."""
    kinds = Optimizer.__subclasses__()
    names = {hyper.alias for kind in kinds for hyper in kind.declaration.hypers}
    return _HEAD.format(names=listed(names)) + "".join(map(_function, kinds))


if __name__ == "__main__":
    write(stub(), Path(__file__).with_name("constructors.pyi"))
