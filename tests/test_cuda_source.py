"""What becomes of the CUDA kernels, from the build's own sources and flags: PTX, machine code.

Nothing runs here, so no GPU is needed. The same bits as on the CPU follow from the instructions:
every operation is one that rounds to nearest, and nothing is fused that the formula does not fuse.
The speed follows from them in part: what is read and written, how, and what is left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from cudatools import (
    ACCESSES,
    ROOT,
    Command,
    Kernel,
    accesses,
    assemble,
    compile_ptx,
    kernel_commands,
    kernel_name,
    kernels_of_cubin,
    kernels_of_ptx,
)
from fusedstep import _core

pytestmark = pytest.mark.skipif(
    not (ROOT / "CMakeLists.txt").exists(), reason="runs in a checkout only"
)

RULES = sorted(_core.rules())
STRUCTS = {rule: rule.title().replace("_", "") for rule in RULES} | {"nadam": "NAdam"}
ARCHITECTURES = (75, 80, 90, 120)  # of each family that differs in registers or instructions
VECTOR = 16  # bytes

Kernels = dict[str, Kernel]


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Command]:
    return kernel_commands(tmp_path_factory.mktemp("build"))


@pytest.fixture(scope="module")
def ptx_files(
    commands: dict[str, Command], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("ptx")
    with ThreadPoolExecutor() as pool:
        jobs = {
            name: pool.submit(compile_ptx, command, folder / f"{name}.ptx")
            for name, command in commands.items()
        }
        return {name: job.result() for name, job in jobs.items()}


@pytest.fixture(scope="module")
def kernels(ptx_files: dict[str, Path]) -> Kernels:
    """The PTX of each kernel."""
    return read_ptx(*ptx_files.values())


def read_ptx(*files: Path) -> Kernels:
    return {k: v for file in files for k, v in kernels_of_ptx(file.read_text()).items()}


def slots_of(rule: str) -> int:
    return len(_core.rules()[rule]["slots"])


def vectors_of(rule: str, access: str) -> int:
    """How many vectors of each buffer a thread updates per round of the loop."""
    return 2 if access == "mixed" and slots_of(rule) <= 2 else 1


def update_loop(kernels: Kernels, rule: str, access: str) -> list[str]:
    """The loop over the elements of a chunk: that which stores vectors."""
    loops = kernels[f"update {STRUCTS[rule]} {access}"].innermost_loops()
    (found,) = (loop for loop in loops if accesses(loop)["st", "global", VECTOR])
    return found


def sum_loops(kernel: Kernel) -> list[list[str]]:
    """The loops over dense gradients: those that only read vectors, and sum in double."""
    loops = [loop for loop in kernel.innermost_loops() if accesses(loop)["ld", "global", VECTOR]]
    return [loop for loop in loops if not accesses(loop)["st", "global", VECTOR]]


def test_there_is_a_kernel_for_every_rule_and_storage(kernels: Kernels) -> None:
    updates = {f"update {STRUCTS[rule]} {access}" for rule in RULES for access in ACCESSES}
    assert set(kernels) == updates | {"update any", "measure", "upload"}


# --- bits -------------------------------------------------------------------------------------


def arithmetic(kernels: Kernels) -> Iterator[tuple[str, str]]:
    """Every operation on floating-point numbers that rounds: (operation, all of the instruction).

    `mul.f32` without a rounding is what a later stage may fuse with an addition.
    """
    for kernel in kernels.values():
        for instruction in kernel.instructions:
            operation, *modifiers = instruction.split(".")
            rounds = operation in {"add", "sub", "mul", "mad", "fma", "div", "rcp", "sqrt", "rsqrt"}
            if rounds and {"f16", "bf16", "f32", "f64"} & set(modifiers):
                yield operation, instruction


def allowed_arithmetic() -> set[tuple[str, str]]:
    operations = ("add", "sub", "mul", "fma", "div", "sqrt")
    return {(op, f"{op}.rn.{real}") for op in operations for real in ("f32", "f64")}


def check_rounding(kernels: Kernels) -> None:
    assert set(arithmetic(kernels)) <= allowed_arithmetic() | {("rcp", "rcp.rn.f64")}


def test_everything_rounds_to_nearest(kernels: Kernels) -> None:
    check_rounding(kernels)
    assert allowed_arithmetic() <= set(arithmetic(kernels))


def test_conversions_round_to_nearest(kernels: Kernels) -> None:
    """Where there is something to round. Counts become integers again, and powers need a floor."""
    found = {i for kernel in kernels.values() for i in kernel.instructions}
    real = {i for i in found if re.fullmatch(r"cvt\.(.*\.)?b?f\d+(\..*)?", i)}
    exact = {"cvt.f32.f16", "cvt.f64.f32", "cvt.rmi.f64.f64"}
    counts = {"cvt.rzi.s32.f64", "cvt.rzi.s64.f64", "cvt.rzi.u32.f64"}
    rounding = {i for i in real - exact - counts if re.match(r"cvt\.rni?\.", i)}
    assert real <= exact | counts | rounding
    assert {"cvt.rn.f16.f32", "cvt.rn.f32.f64"} <= rounding


def check_trap(kernels: Kernels, trap: str) -> None:
    pattern = rf"{re.escape(trap)}\b" if trap.startswith(".") else rf"\b{trap}\b"
    for kernel in kernels.values():
        assert not re.search(pattern, kernel.text), kernel.name


@pytest.mark.parametrize("trap", [".local", ".approx", ".ftz", "call"])
def test_traps(kernels: Kernels, trap: str) -> None:
    """No local memory, no approximation, no flushed denormals, no function such as pow or exp."""
    check_trap(kernels, trap)


BREAKING: dict[str, Callable[[Kernels], None]] = {
    "--fmad=true": check_rounding,
    "--use_fast_math": check_rounding,
    "--ftz=true": lambda kernels: check_trap(kernels, ".ftz"),
    "--prec-div=false": check_rounding,
    "--prec-sqrt=false": lambda kernels: check_trap(kernels, ".approx"),
}


@pytest.fixture(scope="module")
def one_shard(ptx_files: dict[str, Path]) -> str:
    """That of NAdam, which has divisions and roots."""
    return next(n for n, file in ptx_files.items() if "update NAdam float32" in read_ptx(file))


@pytest.fixture(scope="module")
def broken_kernels(
    commands: dict[str, Command], one_shard: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Kernels]:
    """The kernels of one shard by what flag they are compiled with."""
    folder = tmp_path_factory.mktemp("broken")
    with ThreadPoolExecutor() as pool:
        jobs = {
            flag: pool.submit(compile_ptx, commands[one_shard], folder / f"{flag}.ptx", flag)
            for flag in BREAKING
        }
        return {flag: read_ptx(job.result()) for flag, job in jobs.items()}


@pytest.mark.parametrize("flag", BREAKING)
def test_the_tests_see_what_flags_break(
    flag: str,
    one_shard: str,
    ptx_files: dict[str, Path],
    broken_kernels: dict[str, Kernels],
) -> None:
    BREAKING[flag](read_ptx(ptx_files[one_shard]))
    with pytest.raises(AssertionError):
        BREAKING[flag](broken_kernels[flag])


# --- updates ----------------------------------------------------------------------------------


@pytest.mark.parametrize("access", ["float32", "float64"])
@pytest.mark.parametrize("rule", RULES)
def test_an_update_touches_each_buffer_once(kernels: Kernels, rule: str, access: str) -> None:
    """One read of everything, one write of all but the gradient, by vectors of 16 bytes.

    What is misaligned, or at an end, by elements. Nothing else is read: no coefficient, no table.
    """
    size = 4 if access == "float32" else 8
    reads, writes = 2 + slots_of(rule), 1 + slots_of(rule)
    assert accesses(update_loop(kernels, rule, access)) == {
        ("ld", "global", VECTOR): reads,
        ("st", "global", VECTOR): writes,
        ("ld", "global", size): VECTOR // size * reads,
        ("st", "global", size): VECTOR // size * writes,
    }


@pytest.mark.parametrize("rule", RULES)
def test_a_mixed_update_touches_each_buffer_once(kernels: Kernels, rule: str) -> None:
    """The same of each buffer as float32, and as four times 16 bits; a copy is written, too."""
    vectors = (2 + slots_of(rule)) * vectors_of(rule, "mixed")
    assert accesses(update_loop(kernels, rule, "mixed")) == {
        (kind, "global", size): vectors * (1 if size >= 8 else 4)
        for kind in ("ld", "st")
        for size in (VECTOR, VECTOR // 2, 4, 2)
    }


@pytest.mark.parametrize("access", ["float32", "mixed"])
@pytest.mark.parametrize("rule", RULES)
def test_float32_elements_see_no_double(kernels: Kernels, rule: str, access: str) -> None:
    """Coefficients are rounded before the loop. Most GPUs convert 2 of them per clock."""
    loop = update_loop(kernels, rule, access)
    assert any(".f32" in instruction for instruction in loop)
    assert not [instruction for instruction in loop if "f64" in instruction]


@pytest.mark.parametrize("access", ACCESSES)
@pytest.mark.parametrize("rule", RULES)
def test_one_division_and_one_root_per_element(kernels: Kernels, rule: str, access: str) -> None:
    """They cost more than all the rest; a rule without averages of squares has none."""
    loop = update_loop(kernels, rule, access)
    adaptive = any("sq" in slot for slot in _core.rules()[rule]["slots"])
    for operation in ("div", "sqrt"):
        found = sum(i.startswith(f"{operation}.rn") for i in loop)
        assert found == adaptive * (2 if access == "float64" else 4) * vectors_of(rule, access)


# --- norms ------------------------------------------------------------------------------------


def summed_type(loop: Counter[str]) -> str:
    """The type of the gradients that a loop sums."""
    if not loop["cvt.f64.f32"]:
        return "float64"
    if loop["cvt.f32.f16"]:
        return "float16"
    return "bfloat16" if loop["shl.b32"] else "float32"


def test_gradients_are_measured_by_vectors(kernels: Kernels) -> None:
    """Per type a loop that asks for 8 vectors at once, and one for what is left.

    Squares are fused with the sum where they are exact, which is everywhere but in float64.
    """
    elements = {"float16": 8, "bfloat16": 8, "float32": 4, "float64": 2}  # of a vector
    found = []
    for loop in sum_loops(kernels["measure"]):
        count = Counter(loop)
        (vectors,) = accesses(loop).values()
        name = summed_type(count)
        found.append((name, vectors))
        fused = 0 if name == "float64" else elements[name] * vectors
        apart = elements[name] * vectors - fused
        assert count["cvt.f64.f32"] == count["fma.rn.f64"] == fused
        assert count["mul.rn.f64"] == count["add.rn.f64"] == apart
        assert count["cvt.f32.f16"] == (fused if name == "float16" else 0)
    assert sorted(found) == sorted((name, vectors) for name in elements for vectors in (1, 8))


@pytest.mark.parametrize("access", ["float32", "float64"])
@pytest.mark.parametrize("rule", RULES)
def test_results_are_measured_in_their_type_alone(kernels: Kernels, rule: str, access: str) -> None:
    """And by rules without states alone: for others such loops would be half of the code."""
    loops = sum_loops(kernels[f"update {STRUCTS[rule]} {access}"])
    assert bool(loops) == (slots_of(rule) == 0)
    for loop in loops:
        assert summed_type(Counter(loop)) == access
        assert set(accesses(loop)) == {("ld", "global", VECTOR)}


# --- machine code -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Assembled:
    """The machine code of kernels for one architecture, and what the assembler has said."""

    cubins: list[Path]
    said: str


@pytest.fixture(scope="module", params=ARCHITECTURES)
def assembled(
    request: pytest.FixtureRequest, commands: dict[str, Command], ptx_files: dict[str, Path]
) -> Assembled:
    """Of all kernels but that for all rules at once, which takes as long as the others together.

    tests/test_cuda_module.py looks at that one, and at every architecture, where they are built.
    """
    with ThreadPoolExecutor() as pool:
        jobs = [
            pool.submit(assemble, commands[name], file, request.param)
            for name, file in ptx_files.items()
            if "update any" not in read_ptx(file)
        ]
        done = [job.result() for job in jobs]
    return Assembled([cubin for cubin, _ in done], "".join(said for _, said in done))


@pytest.fixture(scope="module")
def machine_code(assembled: Assembled) -> Kernels:
    with ThreadPoolExecutor() as pool:
        listings = pool.map(kernels_of_cubin, assembled.cubins)
        return {name: kernel for listing in listings for name, kernel in listing.items()}


RESOURCES = re.compile(
    r"Function properties for (\w+)\s+"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
)


def test_registers_suffice(assembled: Assembled) -> None:
    """No kernel keeps anything in local memory: the launch bounds are what all GPUs can do."""
    found = {kernel_name(name): amounts for name, *amounts in RESOURCES.findall(assembled.said)}
    assert {name: a for name, a in found.items() if a != ["0", "0", "0"]} == {}
    assert len(found) == len(ACCESSES) * len(RULES) + 2


def test_machine_code_accesses_vectors(machine_code: Kernels) -> None:
    """128 bits of global memory at once, never of memory that might be any, and nothing local."""
    for rule in RULES:
        for access in ACCESSES:
            kernel = machine_code[f"update {STRUCTS[rule]} {access}"]
            wide = Counter(re.findall(r"\b((?:LD|ST)G?\.E\.128)\b", kernel.text))
            assert set(wide) == {"LDG.E.128", "STG.E.128"}, kernel.name
            vectors, buffers = vectors_of(rule, access), 2 + slots_of(rule)
            assert wide["LDG.E.128"] >= vectors * buffers
            assert wide["STG.E.128"] == vectors * (buffers if access == "mixed" else buffers - 1)
    assert machine_code["measure"].text.count("LDG.E.128") >= 4 * 8
    for kernel in machine_code.values():
        assert not [i for i in kernel.instructions if i.startswith(("LDL", "STL"))], kernel.name


def test_machine_code_converts_no_coefficient_twice(
    kernels: Kernels, machine_code: Kernels
) -> None:
    """There are no more conversions than in PTX, where none is in a loop over elements."""
    for name, kernel in machine_code.items():
        known = kernels[name].instructions.count("cvt.rn.f32.f64")
        assert sum(i.startswith("F2F.F32.F64") for i in kernel.instructions) <= known, name
