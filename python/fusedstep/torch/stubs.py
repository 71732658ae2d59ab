"""Writes `optimizers.pyi`: the classes as type checkers and editors read them.

After a change of a class or of what it follows from, with the changed package installed, run
`python -m fusedstep.torch.stubs python/fusedstep/torch/optimizers.pyi`. It is in sync if it equals
`stub()`.
"""

from __future__ import annotations

from pathlib import Path

from fusedstep import hyperparameters
from fusedstep._stubs import listed, quoted, with_default, write
from fusedstep.torch import optimizers
from fusedstep.torch.base import Optimizer
from fusedstep.torch.docs import arguments

_HEAD = '''\
"""Signatures of the classes; written by `python -m fusedstep.torch.stubs`."""

from typing import final

from torch import Tensor
from torch.optim.optimizer import ParamsT

from fusedstep.hyperparameters import (
{names}
)
from fusedstep.torch.base import Optimizer
'''

_CLASS = """
@final
class {name}(Optimizer):
{docstring}

    def __init__(
        self,
        {arguments},
    ) -> None: ...
"""


def _classes() -> list[type[Optimizer]]:
    found = [kind for kind in vars(optimizers).values() if isinstance(kind, type)]
    return [kind for kind in found if kind.__module__ == optimizers.__name__]


def _class(kind: type[Optimizer]) -> str:
    described = arguments(kind._form)
    first = [argument for argument in described if argument.positional]
    texts = [with_default(a.name, a.annotation, a.default) for a in described]
    texts.insert(len(first), "*")
    return _CLASS.format(
        name=kind.__name__,
        docstring=quoted(kind.__doc__ or ""),
        arguments=",\n        ".join(["params: ParamsT", *texts]),
    )


def stub() -> str:
    """The text of the stub."""
    used = {argument.annotation for kind in _classes() for argument in arguments(kind._form)}
    names = listed(name for name in used if hasattr(hyperparameters, name))
    return _HEAD.format(names=names) + "".join(map(_class, _classes()))


if __name__ == "__main__":
    write(stub(), Path(__file__).with_name("optimizers.pyi"))
