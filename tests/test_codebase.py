"""The house in order: layers, symbols, completeness, stubs, and that a forced ISA really runs."""

from __future__ import annotations

import ast
import inspect
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

import fusedstep as fs
import mutation
import pytest
import reference
from fusedstep import _core
from subprocesses import run_python

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc"
PACKAGE = ROOT / "python" / "fusedstep"
FRAMEWORKS = {"torch", "jax", "jaxlib", "cupy", "tensorflow", "paddle", "mlx", "brainstate"}
# What the packages that are named after a framework may import besides.
OWN = {
    "torch": {"torch", "fusedstep.torch"},
    "jax": {"jax", "jaxlib", "fusedstep.jax"},
    "braintools": {"jax", "brainstate", "fusedstep.jax", "fusedstep.braintools"},
}

pytestmark = pytest.mark.skipif(not SOURCES.exists(), reason="runs in a checkout only")


def tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("needs git")
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


# --- layers of the C++ sources ------------------------------------------------------------------


def includes(path: Path) -> tuple[set[str], set[str]]:
    """(quoted, angled) includes of a file."""
    text = path.read_text()
    return set(re.findall(r'#include "([^"]+)"', text)), set(
        re.findall(r"#include <([^>]+)>", text)
    )


def files_of(layer: str) -> Iterator[Path]:
    suffixes = {".cpp", ".hpp", ".cu", ".cuh"}
    yield from sorted(p for p in (SOURCES / layer).rglob("*.*") if p.suffix in suffixes)


@pytest.mark.parametrize(
    ("layer", "allowed"),
    [
        ("core", {"core"}),
        ("rules", {"core", "rules"}),
        ("cpu", {"core", "rules", "cpu"}),
        ("bindings", {"bindings", "core", "cpu"}),
        ("xla", {"xla", "core"}),
        ("cuda", {"cuda", "core", "rules"}),
    ],
)
def test_who_includes_whom(layer: str, allowed: set[str]) -> None:
    found = list(files_of(layer))
    assert found
    for path in found:
        for name in includes(path)[0]:
            assert name.split("/")[0] in allowed, f"{path.name} includes {name}"


def test_rules_are_plain_formulas() -> None:
    """No containers, intrinsics, CUDA or Python in core/ and rules/; each rule is short."""
    plain = {"math.h", "cstddef", "cstdint", "cstring"}
    # What formulas never see: how modules tell each other of exceptions.
    more = {"why_not.hpp": {"exception", "new", "string"}}
    for layer in ("core", "rules"):
        for path in files_of(layer):
            assert includes(path)[1] <= plain | more.get(path.name, set()), path.name
    for path in files_of("rules"):
        lines, rules = path.read_text().splitlines(), path.read_text().count(" name = ")
        assert len(lines) <= 85 + 15 * max(rules, 1), path.name


def test_bindings_see_only_the_seams_of_the_backend() -> None:
    seams = {"cpu/step.hpp", "cpu/isa.hpp", "cpu/threads.hpp", "cpu/rule_info.hpp"}
    for path in files_of("bindings"):
        quoted = includes(path)[0]
        assert {n for n in quoted if n.startswith("cpu/")} <= seams, path.name


def test_only_bindings_know_python_and_dlpack() -> None:
    for layer in ("core", "rules", "cpu"):
        for path in files_of(layer):
            angled = includes(path)[1]
            assert not [n for n in angled if re.match(r"pybind11|Python\.h|dlpack|numpy", n)], (
                path.name
            )


def test_xla_and_python_meet_in_one_file_only() -> None:
    """XLA's headers are in the layer of that name alone, which has no pybind11."""
    for layer in ("core", "rules", "cpu", "bindings"):
        for path in files_of(layer):
            assert not [n for n in includes(path)[1] if n.startswith("xla/")], path.name
    for path in files_of("xla"):
        angled = includes(path)[1]
        assert not [n for n in angled if n.startswith(("pybind11", "dlpack"))], path.name
        assert "Python.h" not in angled or path.name == "module.cpp"


def test_cuda_and_python_meet_in_one_file_only() -> None:
    """CUDA's headers are in the layer of that name alone, whose kernels know no Python."""
    for layer in ("core", "rules", "cpu", "bindings", "xla"):
        for path in files_of(layer):
            assert not [n for n in includes(path)[1] if n.startswith("cu")], path.name
    for path in files_of("cuda"):
        angled = includes(path)[1]
        assert not [n for n in angled if n.startswith(("pybind11", "dlpack"))], path.name
        assert "Python.h" not in angled or path.name == "module.cpp"


def test_rules_are_named_only_by_themselves() -> None:
    """The backend and the bindings know rules through the list alone."""
    for layer in ("core", "cpu", "bindings", "cuda"):
        for path in files_of(layer):
            code = re.sub(r"//.*", "", path.read_text())
            assert not re.search(r"\b(Sgd|Momentum)\b|rules/(sgd|momentum)", code), path.name


# --- symbols ----------------------------------------------------------------------------------

ISA_FLAGS = {
    "scalar": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
}


def compile_kernels(isa: str, folder: Path) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        pytest.skip("needs a C++ compiler")
    out = folder / f"{isa}.o"
    command = [
        *compiler.split(), "-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-fno-math-errno",
        "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-fno-exceptions", "-fno-rtti", "-w",
        f"-I{SOURCES}", f"-DFUSEDSTEP_ISA={isa}", *ISA_FLAGS[isa],
        "-c", str(SOURCES / "cpu" / "kernels.cpp"), "-o", str(out),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return out


def kernel_object(isa: str, folder: Path) -> Path:
    """From the build tree that FUSEDSTEP_BUILD_DIR names, else compiled here."""
    build = os.environ.get("FUSEDSTEP_BUILD_DIR")
    if not build:
        return compile_kernels(isa, folder)
    found = list(Path(build).rglob(f"fusedstep_{isa}.dir/**/kernels.cpp.o"))
    assert len(found) == 1, f"{isa}: {found}"
    return found[0]


@pytest.mark.parametrize("isa", _core.build_info()["isas"])
def test_kernel_objects_export_one_symbol_and_no_weak_one(isa: str, tmp_path: Path) -> None:
    """A weak symbol compiled for AVX-512 could be the one that the linker keeps for everybody."""
    if not shutil.which("nm"):
        pytest.skip("needs nm")
    listing = subprocess.run(
        ["nm", "--defined-only", str(kernel_object(isa, tmp_path))],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    symbols = [line.split()[-2:] for line in listing.stdout.splitlines()]
    weak = [name for kind, name in symbols if kind in "wWvVu"]
    exported = [name for kind, name in symbols if kind.isupper() and kind not in "WV"]
    assert not weak
    assert len(exported) == 1, exported
    assert isa in exported[0]


@pytest.mark.parametrize("module", ["_core", "_xla", "_cuda"])
def test_module_exports_nothing_of_ours_but_its_init_function(module: str) -> None:
    if not shutil.which("nm"):
        pytest.skip("needs nm")
    spec = PathFinder.find_spec(f"fusedstep.{module}", fs.__path__)
    if spec is None:
        pytest.skip(f"this build has no {module}")
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", str(spec.origin)], capture_output=True, text=True, check=True
    )
    names = {line.split()[-1] for line in listing.stdout.splitlines()}
    assert names == {f"PyInit_{module}"}


def test_module_needs_no_openmp_runtime() -> None:
    if not shutil.which("readelf"):
        pytest.skip("needs readelf")
    listing = subprocess.run(
        ["readelf", "-d", _core.__file__], capture_output=True, text=True, check=True
    )
    needed = re.findall(r"NEEDED.*\[(.*)\]", listing.stdout)
    assert needed
    assert not [n for n in needed if re.search("omp", n)]


# --- layers of the Python package ---------------------------------------------------------------


def imports(path: Path) -> set[str]:
    """All modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_no_framework_is_imported_by_any_module() -> None:
    """But by the one that is named after it."""
    for path in PACKAGE.rglob("*.py"):
        roots = {name.split(".")[0] for name in imports(path)}
        roots |= {".".join(name.split(".")[:2]) for name in imports(path)}
        own = OWN.get(path.relative_to(PACKAGE).parts[0], set())
        packages = {f"fusedstep.{name}" for name in OWN}
        assert not roots & ((FRAMEWORKS | packages) - own), path.name


def test_schedules_stand_alone() -> None:
    paths = list((PACKAGE / "schedules").glob("*.py"))
    assert paths
    own = {n for path in paths for n in imports(path) if n.startswith("fusedstep.")}
    assert all(n.startswith(("fusedstep.ranges", "fusedstep.schedules")) for n in own), own


def test_import_brings_in_numpy_alone() -> None:
    """No framework, no test tool, nothing that is not asked for."""
    program = """
        import sys, numpy
        before = set(sys.modules)
        import fusedstep
        roots = {name.split(".")[0] for name in set(sys.modules) - before}
        print(*sorted(r for r in roots if r not in sys.stdlib_module_names and r != "fusedstep"))
    """
    assert run_python(program) == "\n"


def test_import_starts_no_thread() -> None:
    program = """
        import os, numpy
        before = len(os.listdir("/proc/self/task"))
        import fusedstep
        print(len(os.listdir("/proc/self/task")) - before)
    """
    assert run_python(program) == "0\n"


# --- completeness -----------------------------------------------------------------------------


def optimizers() -> list[type[fs.Optimizer]]:
    found, todo = [], [fs.Optimizer]
    while todo:
        kind = todo.pop()
        todo += kind.__subclasses__()
        found += (
            [kind]
            if not inspect.isabstract(kind) and kind.__module__.startswith("fusedstep")
            else []
        )
    return found


def test_rules_oracles_classes_and_functions_are_complete() -> None:
    rules = _core.rules()
    assert set(rules) == set(reference.RULES)
    used = {rule for kind in optimizers() for rule in kind.declaration.rules}
    assert used == set(rules) - {"accumulate"}  # the rule of `Optimizer.accumulate`
    for kind in optimizers():
        assert getattr(fs, kind.__name__) is kind
        assert callable(getattr(fs, kind.declaration.function))
        assert kind.__name__ in fs.__all__
        assert kind.declaration.function in fs.__all__
    steps = {name for name in fs.__all__ if name.startswith("fused_")}
    assert steps == {kind.declaration.function for kind in optimizers()}


def test_oracles_agree_with_the_rules_about_names() -> None:
    for name, info in _core.rules().items():
        rule = reference.RULES[name]
        assert tuple(info["slots"]) == rule.slots
        assert set(info["hypers"]) == set(rule.defaults)
        assert all(len(k) == len(info["coefficients"]) for k in rule.coefficients.values())
        assert tuple(info["scalars"]) == rule.scalars
        made = rule.prepare(rule.hyper(), reference.Progress())
        assert len(made) == len(info["coefficients"])


# Hyper-parameters that a form of RMSprop has in common with the others, but does not read.
UNREAD = {
    (rule, hyper)
    for rule in ("rmsprop", "rmsprop_centered")
    for hyper in ("momentum", "next_momentum", "nesterov")
}


def test_every_hyper_parameter_and_coefficient_is_exercised() -> None:
    """A case table that never sets a hyper-parameter would not notice it being ignored."""
    for name, rule in reference.RULES.items():
        for hyper, default in rule.defaults.items():
            values = [case.get(hyper, default) for case in rule.cases.values()]
            fixed = not rule.cases or (name, hyper) in UNREAD
            assert fixed or len({repr(v) for v in values}) > 1, f"{name}: {hyper}"
        for column in zip(*rule.coefficients.values(), strict=True):
            assert any(column), name


def test_public_names() -> None:
    assert sorted(fs.__all__) == sorted(set(fs.__all__))
    missing = [name for name in fs.__all__ if not hasattr(fs, name)]
    assert not missing
    for name in fs.__all__:
        member = getattr(fs, name)
        if callable(member):
            assert inspect.getdoc(member), name


def test_docstrings_of_optimizers() -> None:
    """Formula, arguments, state, errors, numerics, example, source: on every rule."""
    for kind in optimizers():
        text = inspect.getdoc(kind)
        for part in (".. math::", "Args:", "Raises:", "Numerics:", "Example:", "References:"):
            assert part in text, f"{kind.__name__}: {part}"
        for hyper in kind.declaration.hypers:
            assert f"{hyper.name}" in text.split("Args:")[1], f"{kind.__name__}: {hyper.name}"


# --- stubs ------------------------------------------------------------------------------------


def stub_names(path: Path) -> dict[str, set[str]]:
    """Top-level names of a stub, with the public members of its classes."""
    found: dict[str, set[str]] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = set()
        elif isinstance(node, ast.ClassDef):
            members = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
            members |= {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}
            found[node.name] = {m for m in members if not m.startswith("_")}
    return found


def test_core_stub_names_what_the_module_has() -> None:
    stub = stub_names(PACKAGE / "_core.pyi")
    real = {name for name in vars(_core) if not name.startswith("_")}
    assert set(stub) == real
    for name, members in stub.items():
        if inspect.isclass(getattr(_core, name)) and not issubclass(
            getattr(_core, name), Exception
        ):
            actual = {m for m in dir(getattr(_core, name)) if not m.startswith(("_", "n_"))}
            assert members == actual - set(dir(tuple)), name


def test_functional_stub_is_in_sync() -> None:
    """The stub of the generated functions has their signatures, argument by argument."""
    tree = ast.parse((PACKAGE / "functional.pyi").read_text())
    declared = {node.name: node.args for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert set(declared) == {kind.declaration.function for kind in optimizers()}
    for name, arguments in declared.items():
        parameters = inspect.signature(getattr(fs, name)).parameters
        positional = [a.arg for a in arguments.args]
        keyword = [a.arg for a in arguments.kwonlyargs]
        kinds = {n: p.kind is inspect.Parameter.KEYWORD_ONLY for n, p in parameters.items()}
        assert positional == [n for n, only in kinds.items() if not only], name
        assert keyword == [n for n, only in kinds.items() if only], name
        required = [a for a, d in zip(keyword, arguments.kw_defaults, strict=True) if d is None]
        assert required == ["lr"], name


def test_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()


# --- instruction sets -------------------------------------------------------------------------


@pytest.mark.parametrize("name", _core.available_isas())
def test_forced_isa_really_runs(name: str) -> None:
    program = """
        import numpy as np, fusedstep as fs
        fs.fused_sgd_step(np.zeros(100), np.ones(100), lr=0.1)
        print(fs._core.active_isa())
    """
    assert run_python(program, FUSEDSTEP_FORCE_ISA=name) == f"{name}\n"


def test_best_isa_is_the_default() -> None:
    program = "import fusedstep as fs; print(fs._core.active_isa(), *fs._core.available_isas())"
    active, *available = run_python(program, FUSEDSTEP_FORCE_ISA="").split()
    assert active == available[0]
    assert available[-1] == "scalar"


@pytest.mark.parametrize("name", ["sse9", "AVX2 ", "neon2"])
def test_unknown_isa_is_an_error(name: str) -> None:
    program = (
        "import numpy as np, fusedstep as fs; fs.fused_sgd_step(np.zeros(1), np.ones(1), lr=0.1)"
    )
    error = run_python(program, FUSEDSTEP_FORCE_ISA=name, fails=True)
    assert "RuntimeError" in error
    assert name in error
    with pytest.raises(RuntimeError, match=re.escape(name)):
        _core.force_isa(name)


def test_build_info() -> None:
    info = fs.build_info()
    assert info["version"] == fs.__version__
    assert set(_core.available_isas()) <= set(info["isas"])
    assert info["cuda"] == (PathFinder.find_spec("fusedstep._cuda", fs.__path__) is not None)
    assert re.search(r"\d", info["compiler"])


# --- files ------------------------------------------------------------------------------------


def test_lengths() -> None:
    """A file that grows past the limit has two reasons to change."""
    for path in tracked_files():
        if (
            path.suffix in {".py", ".cpp", ".hpp", ".h", ".cu", ".cuh"}
            and path.name != "test_rejections.py"
        ):
            lines = path.read_text().splitlines()
            assert len(lines) <= 600, f"{path.relative_to(ROOT)}: {len(lines)} lines"


def test_mutations_are_of_this_source() -> None:
    """A table that nobody can apply any more tests nothing (tests/mutation.py)."""
    stale = [m.name for m in mutation.MUTATIONS if (ROOT / m.file).read_text().count(m.old) != 1]
    assert not stale


def test_no_machine_is_named() -> None:
    """Paths of a machine, of users, and names of registry hosts stay out of the repository."""
    forbidden = re.compile(
        "|".join(["/" + "home/", "/" + "root/", "/" + "work/", "/" + "Users/", r"/tmp/\w*v0"])
    )
    for path in tracked_files():
        if path.suffix in {".png", ".npz"}:
            continue
        text = path.read_text(errors="replace")
        found = forbidden.search(text)
        assert not found, f"{path.relative_to(ROOT)}: {found.group()}"
