"""The parts of the pages that follow from the code: written anew by every build."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable
from pathlib import Path

import fusedstep as fs
from fusedstep import _core
from fusedstep.conventions import CONVENTIONS, NOT_NESTEROV

ROOT = Path(__file__).resolve().parent.parent
# Rules with a section in rules.md, whose oracles stand beside their formulas.
RULES = ("sgd", "momentum", "nadam", "adam", "rmsprop", "accumulate")


def write(folder: Path) -> None:
    """Writes all parts into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {
        "api.md": api(),
        "torch_api.md": torch_api(),
        "conventions.md": conventions(),
        "differences.md": differences(),
        "not_nesterov.md": not_nesterov(),
        **{f"oracle_{rule}.md": oracle(rule) for rule in RULES},
        "oracle_helpers.md": functions_of_oracles(n for n in _oracles() if n in helpers()),
        "jax_api.md": jax_api(),
    }
    for name, text in parts.items():
        (folder / name).write_text(text, encoding="utf-8")


# --- Markdown -----------------------------------------------------------------------------------


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _code(text: str) -> str:
    return f"`{text}`" if text else "-"


# --- conventions --------------------------------------------------------------------------------


def conventions() -> str:
    """What each system computes."""
    rows = (
        (_code(name), row.title, _code(row.formula), _nesterov(row.nesterov, row.pretender))
        for name, row in CONVENTIONS.items()
    )
    return _table(("`system`", "what", "momentum", "Nesterov momentum"), rows)


def _nesterov(formula: str, pretender: str) -> str:
    return f"not one: `{pretender}`" if pretender else _code(formula)


def differences() -> str:
    """What has to be known to go on, and where it can be read."""
    rows = (
        (
            _code(name),
            _velocity(row.sign, row.lr_inside, row.unit_gain),
            row.order,
            " ".join(filter(None, [row.note, "Keeps the base point." * row.base_point])) or "-",
            row.source,
        )
        for name, row in CONVENTIONS.items()
    )
    return _table(("`system`", "velocity sums", "clip and decay", "note", "source"), rows)


def _velocity(sign: int, inside: bool, unit_gain: bool) -> str:
    factors = "(1 - mu) " * unit_gain + "lr " * inside
    return f"`{'+' if sign > 0 else '-'}{factors}g`"


def not_nesterov() -> str:
    """The pretenders: what they compute, and what to use."""
    return "\n".join(
        f"**{entry.title}** (`{name}`)\n"
        f": `{entry.formula}`\n\n"
        f"  It {entry.why}.\n\n"
        f"  Instead: {entry.instead}.\n\n"
        f"  Source: {entry.source}.\n"
        for name, entry in NOT_NESTEROV.items()
    )


# --- oracles ------------------------------------------------------------------------------------


def _oracles() -> dict[str, tuple[Path, ast.FunctionDef]]:
    """The functions of the executable specification, and the files they stand in."""
    files = [*ROOT.glob("tests/formulas.py"), *ROOT.glob("tests/reference.py")]
    return {
        node.name: (path, node)
        for path in files
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }


def section_of(rule: str) -> str:
    """The section of rules.md that a compiled rule belongs to: `adam` for `adam_amsgrad`."""
    return next((name for name in RULES if rule == name or rule.startswith(f"{name}_")), "")


def _shown(rule: str) -> list[str]:
    """The oracle functions of a section: preparation, formula, and its forms."""
    forms = sorted(name for name in _oracles() if name.startswith(f"{rule}_"))
    return [f"prepare_{rule}", rule, *forms]


def helpers() -> set[str]:
    """What the oracles call, and what that calls, without the oracles themselves."""
    found = _oracles()
    oracles = {name for rule in RULES for name in _shown(rule)} & found.keys()
    todo, seen = set(oracles), set()
    while todo:
        seen |= todo
        called = set().union(*(_called(found[name][1]) for name in todo))
        todo = (called & found.keys()) - seen
    return seen - oracles


def _called(function: ast.FunctionDef) -> set[str]:
    calls = (node.func for node in ast.walk(function) if isinstance(node, ast.Call))
    return {call.id for call in calls if isinstance(call, ast.Name)}


def oracle(rule: str) -> str:
    """Preparation and formula of a rule. A rule that the package has cannot lack them."""
    names = _shown(rule)
    missing = [name for name in names if name not in _oracles()]
    if missing and rule in _core.rules():
        raise LookupError(f"the tests have no oracle {', '.join(missing)}")
    return "" if missing else functions_of_oracles(names)


def functions_of_oracles(names: Iterable[str]) -> str:
    """Literal includes of functions out of the tests."""
    found = _oracles()
    return "\n".join(
        f"```{{literalinclude}} /../{found[name][0].relative_to(ROOT).as_posix()}\n"
        f":pyobject: {name}\n```\n"
        for name in names
    )


# --- API ----------------------------------------------------------------------------------------


def torch_api() -> str:
    """Classes of `fusedstep.torch`, base first; read from the stub, as torch may be missing."""
    stub = Path(fs.__file__).parent / "torch" / "optimizers.pyi"
    classes = [node for node in ast.parse(stub.read_text()).body if isinstance(node, ast.ClassDef)]
    lines = [".. autoclass:: fusedstep.torch.Optimizer()\n   :members:"]
    lines += [f".. autoclass:: fusedstep.torch.{node.name}({_signature(node)})" for node in classes]
    return "\n".join(f"```{{eval-rst}}\n{line}\n```\n" for line in lines)


def _signature(node: ast.ClassDef) -> str:
    """Arguments and defaults of a class in a stub."""
    (made,) = (member for member in node.body if isinstance(member, ast.FunctionDef))
    for argument in (*made.args.args, *made.args.kwonlyargs):
        argument.annotation = None
    return ast.unparse(made.args).removeprefix("self, ")


def api() -> str:
    """A section for every kind of public name, bases first; each name in exactly one of them."""
    names = [name for name in fs.__all__ if name != "__version__"]
    names.sort(key=lambda name: not inspect.isabstract(getattr(fs, name)))
    steps = [name for name in names if name.startswith("fused_")]
    optimizers = [name for name in names if _is_a(name, fs.Optimizer)]
    kinds = [kind for name, kind in vars(fs).items() if name.endswith("Schedule")]
    schedules = [name for name in names if any(_is_a(name, kind) for kind in kinds)]
    told = {"StepResult", "DeviceStepResult", "Continuation", "CudaStatus"}
    results = [name for name in names if name in told]
    listed = {*steps, *optimizers, *schedules, *results}
    sections = {
        "Functional steps": steps,
        "Optimizers": optimizers,
        "Schedules": schedules,
        "Results": results,
        "Other functions and errors": [name for name in names if name not in listed],
    }
    text = "".join(f"\n## {title}\n{_entries(found)}" for title, found in sections.items())
    return text.lstrip()


def jax_api() -> str:
    """The public names of `fusedstep.jax`: transforms, and what they return."""
    import fusedstep.jax as fj

    entries = []
    for name in sorted(fj.__all__, key=lambda name: name[0].isupper()):
        kind = isinstance(getattr(fj, name), type)
        directive = f"auto{'class' if kind else 'function'}:: fusedstep.jax.{name}"
        entries.append(f".. {directive}\n   :members:" if kind else f".. {directive}")
    return "".join(f"\n```{{eval-rst}}\n{entry}\n```\n" for entry in entries).lstrip()


def _is_a(name: str, base: object) -> bool:
    member = getattr(fs, name)
    return isinstance(member, type) and isinstance(base, type) and issubclass(member, base)


def _entries(names: Iterable[str]) -> str:
    return "".join(f"\n```{{eval-rst}}\n{_directive(name)}\n```\n" for name in names)


def _directive(name: str) -> str:
    member = getattr(fs, name)
    if not isinstance(member, type):
        return f".. autofunction:: fusedstep.{name}"
    if issubclass(member, Exception):
        return f".. autoexception:: fusedstep.{name}"
    # What all optimizers and schedules have stands once, with their bases.
    lines = [f".. autoclass:: fusedstep.{name}"]
    if inspect.isabstract(member):
        lines.append("   :members:")
    return "\n".join(lines)
