"""The rules as a CUDA compiler sees them: the same headers, and which instructions become of them.

Nothing runs here, so no GPU is needed. The same bits as on the CPU follow from the instructions:
every operation is one that rounds to nearest, and nothing is fused that the formula does not fuse.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fusedstep import _core

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "tests" / "cuda" / "instantiate.cu"
RULES = sorted(_core.rules())
# What converting coefficients, and asking whether they are zero, takes.
DOUBLE_IN_FLOAT32 = {"ld.global.f64", "cvt.rn.f32.f64", "setp.eq.f64", "setp.neu.f64"}

Kernels = dict[str, str]


def compile_ptx(folder: Path, *flags: str) -> Kernels:
    """The PTX of each kernel by its name; warnings are errors."""
    nvcc = shutil.which("nvcc")
    if not nvcc:
        pytest.skip("needs nvcc, the compiler of the CUDA toolkit")
    out = folder / "instantiate.ptx"
    command = [
        *(nvcc, "-std=c++17", "--fmad=false", "-arch=sm_80", f"-I{ROOT / 'csrc'}", "-ptx"),
        *("-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra", *flags),
        *(str(SOURCE), "-o", str(out)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    head, *parts = out.read_text().split(".visible .entry ")
    assert ".func" not in head
    return {part.split("(")[0]: part for part in parts}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return compile_ptx(tmp_path_factory.mktemp("ptx"))


def instructions(kernel: str) -> list[str]:
    """The operations of a kernel in order, with their modifiers."""
    return re.findall(r"^\s+(?:@!?%p\d+\s+)?([a-z][\w.]*)\s", kernel, re.MULTILINE)


def kernel_of(kernels: Kernels, function: str, rule: str, letter: str = "") -> str:
    """The kernel `function` of a rule; letter: f or d, for the arithmetic type."""
    struct = rule.replace("_", "")
    name = re.compile(rf"\d{function}INS_\d+{struct}E{letter}E", re.IGNORECASE)
    (found,) = (text for mangled, text in kernels.items() if name.search(mangled))
    return found


def test_every_rule_compiles_unchanged(kernels: Kernels) -> None:
    assert len(kernels) == 3 * len(RULES) + 2
    for rule in RULES:
        assert "st.global.f64" in instructions(kernel_of(kernels, "prepare", rule))


@pytest.mark.parametrize("letter", ["f", "d"])
@pytest.mark.parametrize("rule", RULES)
def test_a_step_touches_each_buffer_once(kernels: Kernels, rule: str, letter: str) -> None:
    """One read of everything, one write of all but the gradient."""
    found = instructions(kernel_of(kernels, "apply", rule, letter))
    real = {"f": "f32", "d": "f64"}[letter]
    slots = len(_core.rules()[rule]["slots"])
    assert found.count(f"st.global.{real}") == 1 + slots
    if letter == "f":
        assert found.count("ld.global.f32") == 2 + slots


def arithmetic(kernels: Kernels) -> Iterator[tuple[str, str]]:
    """Every operation on floating-point numbers that rounds: (operation, all of the instruction).

    `mul.f32` without a rounding is what a later stage may fuse with an addition.
    """
    for text in kernels.values():
        for instruction in instructions(text):
            operation, *modifiers = instruction.split(".")
            rounds = operation in {"add", "sub", "mul", "mad", "fma", "div", "rcp", "sqrt", "rsqrt"}
            if rounds and {"f32", "f64"} & set(modifiers):
                yield operation, instruction


def test_everything_rounds_to_nearest(kernels: Kernels) -> None:
    found = set(arithmetic(kernels))
    operations = ("add", "sub", "mul", "fma", "div", "sqrt")
    allowed = {(op, f"{op}.rn.{real}") for op in operations for real in ("f32", "f64")}
    assert found <= allowed | {("rcp", "rcp.rn.f64")}
    assert allowed <= found


@pytest.mark.parametrize("trap", [".local", ".approx", ".ftz", "call"])
def test_traps(kernels: Kernels, trap: str) -> None:
    """No local memory, no approximation, no flushed denormals, no function such as pow or exp."""
    for name, text in kernels.items():
        pattern = rf"{re.escape(trap)}\b" if trap.startswith(".") else rf"\b{trap}\b"
        assert not re.search(pattern, text), name


@pytest.mark.parametrize("rule", RULES)
def test_float32_elements_see_no_double_arithmetic(kernels: Kernels, rule: str) -> None:
    found = instructions(kernel_of(kernels, "apply", rule, "f"))
    doubles = {instruction for instruction in found if "f64" in instruction}
    assert doubles <= DOUBLE_IN_FLOAT32
    assert "cvt.rn.f32.f64" in doubles


@pytest.mark.parametrize("letter", ["f", "d"])
@pytest.mark.parametrize("rule", RULES)
def test_one_division_and_one_root(kernels: Kernels, rule: str, letter: str) -> None:
    """They cost more than all the rest; a rule without averages of squares has none."""
    found = instructions(kernel_of(kernels, "apply", rule, letter))
    adaptive = any("sq" in slot for slot in _core.rules()[rule]["slots"])
    for operation in ("div", "sqrt"):
        assert sum(i.startswith(f"{operation}.rn") for i in found) == adaptive


@pytest.mark.parametrize(
    ("flag", "broken"),
    [
        ("--fmad=true", test_everything_rounds_to_nearest),
        ("--use_fast_math", test_everything_rounds_to_nearest),
        ("--ftz=true", lambda kernels: test_traps(kernels, ".ftz")),
        ("--prec-div=false", test_everything_rounds_to_nearest),
        ("--prec-sqrt=false", lambda kernels: test_traps(kernels, ".approx")),
    ],
)
def test_the_tests_see_what_flags_break(
    tmp_path: Path, flag: str, broken: Callable[[Kernels], None]
) -> None:
    with pytest.raises(AssertionError):
        broken(compile_ptx(tmp_path, flag))
