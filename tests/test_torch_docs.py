"""What readers, editors and type checkers see of fusedstep.torch: signatures, docstrings, stub."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import fusedstep
import pytest

try:
    import torch
    from fusedstep import torch as optim
    from fusedstep.torch import stubs
except ImportError:  # the marker leaves the tests out, by name
    torch = None

pytestmark = pytest.mark.framework("torch")

NAMES = ("SGD", "Momentum", "MomentumNesterov", "NAdam", "Adam", "AdamW", "RMSprop")
PACKAGE = Path(fusedstep.__file__).parent / "torch"


def section(kind: Any, title: str) -> str:
    """A section of a class's docstring."""
    _, found, rest = inspect.getdoc(kind).partition(f"\n{title}:\n")
    assert found, f"{kind.__name__}: {title}"
    lines = rest.splitlines()
    end = next((k for k, line in enumerate(lines) if line and not line.startswith(" ")), None)
    return "\n".join(lines[:end])


def test_every_optimizer_has_a_class() -> None:
    core = [k for k in fusedstep.Optimizer.__subclasses__() if k.__module__.startswith("fusedstep")]
    assert {kind.__name__ for kind in core} == set(NAMES)
    assert set(optim.__all__) == {*NAMES, "Optimizer"}
    for name in NAMES:
        assert getattr(optim, name).form is getattr(fusedstep, name)


@pytest.mark.parametrize("name", NAMES)
def test_docstring_has_all_parts(name: str) -> None:
    kind = getattr(optim, name)
    text = inspect.getdoc(kind)
    assert text.index(".. math::") < text.index("Args:") < text.index("State:")
    for title in ("Args", "State", "Raises", "Numerics", "Example", "References"):
        assert section(kind, title).strip(), title
    assert max(map(len, text.splitlines())) <= 96  # it stands indented in the stub
    assert f"optim.{name}(" in section(kind, "Example")


@pytest.mark.parametrize("name", NAMES)
def test_docstring_tells_every_argument(name: str) -> None:
    kind = getattr(optim, name)
    documented = [
        line.strip().partition(":")[0]
        for line in section(kind, "Args").splitlines()
        if len(line) - len(line.lstrip()) == 4
    ]
    assert documented == list(inspect.signature(kind).parameters)
    for core_only in ("schedule object", "function of t", "(path, array)"):
        assert core_only not in section(kind, "Args")  # groups hold numbers here


@pytest.mark.parametrize("name", NAMES)
def test_docstring_tells_every_state(name: str) -> None:
    """All that a form with everything keeps, and nothing else."""
    kind = getattr(optim, name)
    names = set(inspect.signature(kind).parameters)
    everything = {"momentum": 0.9, "amsgrad": True, "centered": True, "master_weights": True}
    param = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = kind([param], **{k: v for k, v in everything.items() if k in names})
    param.grad = torch.ones_like(param)
    optimizer.step()
    documented = [
        line.split("`")[1] for line in section(kind, "State").splitlines() if "- `" in line
    ]
    assert sorted(documented) == sorted(optimizer.state[param])


@pytest.mark.parametrize("name", [name for name in NAMES if "Momentum" not in name])
def test_torchs_arguments_are_there(name: str) -> None:
    """In its order where they may be given by position, and with its defaults."""
    theirs = inspect.signature(getattr(torch.optim, name)).parameters
    ours = inspect.signature(getattr(optim, name)).parameters
    by_position = [n for n, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert list(ours)[: len(by_position)] == by_position
    for argument, parameter in theirs.items():
        assert ours[argument].kind is parameter.kind, argument
        assert ours[argument].default == parameter.default, argument


def test_stub_is_in_sync() -> None:
    assert (PACKAGE / "optimizers.pyi").read_text() == stubs.stub()


@pytest.mark.parametrize("name", NAMES)
def test_stub_has_the_signature(name: str) -> None:
    """Argument by argument, as `inspect` sees it."""
    tree = ast.parse((PACKAGE / "optimizers.pyi").read_text())
    (kind,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    (made,) = (n for n in kind.body if isinstance(n, ast.FunctionDef))
    parameters = inspect.signature(getattr(optim, name)).parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [a.arg for a in made.args.args] == ["self", *(p.name for p in positional)]
    assert [a.arg for a in made.args.kwonlyargs] == [
        p.name for p in parameters if p.kind is p.KEYWORD_ONLY
    ]
    defaults = [ast.literal_eval(d) for d in (*made.args.defaults, *made.args.kw_defaults)]
    assert defaults == [p.default for p in parameters if p.name != "params"]
    assert ast.get_docstring(kind) == inspect.getdoc(getattr(optim, name)).rstrip()
