"""Conformance: every rule, form, storage and instruction set gives the oracle's bits.

One call steps all sizes at once: 0, 1, around every vector width, around the chunk borders, 100003.
"""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

import driver
import guarded
import numpy as np
import pytest
import reference
from exact import DTYPES, mismatch
from fusedstep import _core

RULES = reference.RULES
STEPPED = [rule for rule in RULES if RULES[rule].cases]  # the others have no function
FORMS = [(rule, case) for rule in RULES for case in RULES[rule].cases]
RAW = [(rule, case) for rule in RULES for case in RULES[rule].coefficients]
ALL_STORAGES = driver.KERNEL_STORAGES + driver.STAGED_STORAGES
PLAIN_STORAGES = tuple((p, p, "float64" if p == "float64" else "float32") for p in DTYPES)
# The two oldest rules run everything with everything. For the others every case meets the storages
# that have a loop of their own, and "all terms" meets all of them.
THOROUGH = ("sgd", "momentum")

CONDITIONS: dict[str, dict[str, Any]] = {
    "maximize": {"maximize": True},
    "rescale": {"rescale_grad": 0.37},
    "clip value": {"grad_clip_value": 0.3},
    "clip norm": {"grad_clip_norm": 1.5},
    "all": {"maximize": True, "rescale_grad": -3.7, "grad_clip_norm": 9.0, "grad_clip_value": 0.01},
}
CONDITIONED_FORM = {"momentum": "nesterov dampened"}


def cross(pairs: list[tuple[str, str]], candidates: tuple) -> list:
    """(rule, case, storage) with readable ids."""
    return [
        pytest.param(rule, case, storage, id=f"{rule}-{case}-{'-'.join(storage)}")
        for rule, case in pairs
        for storage in driver.storages(
            rule, candidates if rule in THOROUGH or case == "all terms" else PLAIN_STORAGES
        )
    ]


@functools.lru_cache(maxsize=1)
def expected_form(rule: str, case: str, storage: tuple[str, str, str]) -> reference.Group:
    group = driver.make_group(rule, RULES[rule].cases[case], storage)
    return driver.oracle(group, driver.gradients(storage[1]))


@pytest.mark.parametrize(("rule", "case", "storage"), cross(FORMS, driver.KERNEL_STORAGES))
def test_form(rule: str, case: str, storage: tuple[str, str, str], isa: str) -> None:
    compiled = driver.Compiled(driver.make_group(rule, RULES[rule].cases[case], storage))
    for grads in driver.gradients(storage[1]):
        compiled.step(grads)
    compiled.check(expected_form(rule, case, storage), isa)


@functools.lru_cache(maxsize=1)
def expected_condition(rule: str, condition: str, storage: tuple[str, str, str]) -> reference.Group:
    group = conditioned_group(rule, condition, storage)
    return driver.oracle(group, driver.gradients(storage[1]))


def conditioned_group(rule: str, condition: str, storage: tuple[str, str, str]) -> reference.Group:
    form = RULES[rule].cases[CONDITIONED_FORM.get(rule, "coupled decay")]
    return driver.make_group(rule, form, storage, **CONDITIONS[condition])


@pytest.mark.parametrize(
    ("rule", "condition", "storage"),
    cross([(r, c) for r in STEPPED for c in CONDITIONS], ALL_STORAGES),
)
def test_condition(rule: str, condition: str, storage: tuple[str, str, str], isa: str) -> None:
    compiled = driver.Compiled(conditioned_group(rule, condition, storage))
    for grads in driver.gradients(storage[1]):
        compiled.step(grads)
    compiled.check(expected_condition(rule, condition, storage), isa)


SHORT = (*guarded.VECTOR_SIZES, 1024, 1025, 2050, 16_385)
TERMS = list(
    itertools.product(
        [{}, *reference.DECAYS.values()],
        [{}, {"nesterov": True}],
        [{}, {"rescale_grad": 0.37}, {"grad_clip_value": 0.3}, CONDITIONS["all"]],
    )
)


@pytest.mark.parametrize("storage", PLAIN_STORAGES, ids=lambda s: s[0])
@pytest.mark.parametrize("rule", STEPPED)
def test_every_set_of_terms(rule: str, storage: tuple[str, str, str], isa: str) -> None:
    """The kernels have a loop of their own for each set of terms that a form may lack."""
    for decay, form, limits in TERMS:
        known = {k: v for k, v in {**decay, **form}.items() if k in RULES[rule].defaults}
        group = driver.make_group(rule, known, storage, SHORT, **limits)
        compiled = driver.Compiled(group)
        for grads in driver.gradients(storage[1], SHORT):
            compiled.step(grads)
        what = f"{isa}, {known}, {limits}"
        compiled.check(driver.oracle(group, driver.gradients(storage[1], SHORT)), what)


@functools.lru_cache(maxsize=1)
def expected_raw(rule: str, case: str, storage: tuple[str, str, str]) -> reference.Group:
    group = driver.make_group(rule, {}, storage)
    for grads in driver.gradients(storage[1]):
        for p, g, slots in zip(group.params, grads, group.slots, strict=True):
            reference.apply_coefficients(rule, RULES[rule].coefficients[case], p, g, slots)
    return group


@pytest.mark.parametrize(("rule", "case", "storage"), cross(RAW, driver.KERNEL_STORAGES))
def test_raw_coefficients(rule: str, case: str, storage: tuple[str, str, str], isa: str) -> None:
    compiled = driver.Compiled(driver.make_group(rule, {}, storage))
    for grads in driver.gradients(storage[1]):
        compiled.step_coefficients(RULES[rule].coefficients[case], grads)
    compiled.check(expected_raw(rule, case, storage), isa)


@pytest.mark.parametrize("copy_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("grad", driver.WIDE)
@pytest.mark.parametrize(
    ("rule", "case"), [("sgd", "coupled decay"), ("momentum", "nesterov"), ("nadam", "plain")]
)
def test_param_copy(rule: str, case: str, grad: str, copy_dtype: str, isa: str) -> None:
    storage = ("float32", grad, "float32")
    group = driver.make_group(rule, RULES[rule].cases[case], storage, copy_dtype=copy_dtype)
    compiled = driver.Compiled(group)
    for grads in driver.gradients(grad):
        compiled.step(grads)
    compiled.check(driver.oracle(group, driver.gradients(grad)), isa)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("size", guarded.VECTOR_SIZES[1:])
@pytest.mark.parametrize("storage", [("float32",) * 3, ("float64",) * 3, ("bfloat16",) * 3])
def test_alone_at_every_alignment(storage: tuple[str, str, str], size: int) -> None:
    """A call with one small tensor stays on the calling thread; all offsets up to a register."""
    group = driver.make_group("momentum", {"nesterov": True}, storage, (size,))
    grads = driver.gradients(storage[1], (size,))
    expected = driver.oracle(group, grads)
    for offset in range(16):
        compiled = driver.Compiled(group)
        compiled.params.buffers[0] = guarded.Guarded(group.params[0], offset)
        compiled.params.arrays[0] = compiled.params.buffers[0].array
        for step_grads in grads:
            compiled.step(step_grads)
        compiled.check(expected, f"offset {offset}")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("rule", "case"), FORMS)
@pytest.mark.parametrize("param", list(DTYPES))
def test_first_step(rule: str, case: str, param: str) -> None:
    """State made by the call, float32 or float64: the first-step form, then as usual."""
    state = "float64" if param == "float64" else "float32"
    sizes = guarded.VECTOR_SIZES
    group = driver.make_group(rule, RULES[rule].cases[case], (param, param, state), sizes)
    for slot in (s for slots in group.slots for s in slots):
        slot[...] = 0
    params = [p.copy() for p in group.params]
    function, hyper = driver.public_form(rule, group.hyper)
    made: dict[str, Any] = {}
    for t, grads in enumerate(driver.gradients(param, sizes)):
        made = function(params, grads, **made, **hyper).state
        group.grads, group.first = grads, t == 0
        reference.step([group])
    assert set(made) == {*RULES[rule].slots, *RULES[rule].scalars}
    assert made.get("step", driver.STEPS) == driver.STEPS
    assert made.get("mu_product", group.product) == group.product
    for i, p in enumerate(params):
        assert not mismatch(p, group.params[i])
        for k, name in enumerate(RULES[rule].slots):
            assert not mismatch(made[name][i], group.slots[i][k]), name


@pytest.mark.usefixtures("isa")
def test_several_groups_in_one_call() -> None:
    """Rules and rows mix in one call of an optimizer; each tensor gets its own row."""
    import fusedstep as fs

    sizes = (33, 16385, 7)
    groups = [
        driver.make_group("momentum", {"nesterov": True, "lr": 0.2}, ("float32",) * 3, sizes),
        driver.make_group(
            "momentum",
            {"momentum": 0.5, "weight_decay": 0.1},
            ("bfloat16", "bfloat16", "float32"),
            sizes,
        ),
        driver.make_group("sgd", {"lr": 0.3}, ("float64",) * 3, sizes),
    ]
    for slot in (s for group in groups for slots in group.slots for s in slots):
        slot[...] = 0
    params = [[p.copy() for p in group.params] for group in groups]
    opt = fs.SGD(
        [
            {"params": params[0], "lr": 0.2, "momentum": 0.9, "nesterov": True},
            {"params": params[1], "momentum": 0.5, "weight_decay": 0.1},
            {"params": params[2], "lr": 0.3},
        ],
        lr=0.1,
        grad_clip_norm=2.0,
    )
    for t in range(driver.STEPS):
        for group in groups:
            group.grads, group.first = (
                driver.gradients(str(group.params[0].dtype), sizes)[t],
                t == 0,
            )
            group.grad_clip_norm = 2.0
        result = opt.step([group.grads for group in groups])
        norm, clips = reference.step(groups)
        assert (result.grad_norm, result.clip_coef) == (norm, clips[0])
    for got, group in zip(params, groups, strict=True):
        assert not any(mismatch(p, q) for p, q in zip(got, group.params, strict=True))


# --- the block-wise state ---------------------------------------------------------------------

BLOCK_SIZES = (1, 2, 255, 256, 257, 511, 1000, 16383, 16384, 16385, 40_000)


def block_states(rng: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
    states = []
    for size in BLOCK_SIZES:
        x = guarded.random_values(rng, size, "float32")
        x[: size // 3] *= np.float32(1e-30)
        states.append(reference.encode_blocks(x))
    return states


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("param", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["all terms", "FISTA", "nothing"])
def test_block_wise_state(case: str, param: str) -> None:
    group = driver.make_group("momentum", {}, (param, param, "float32"), BLOCK_SIZES)
    states = block_states(np.random.default_rng(7))
    codes = guarded.GuardedList([c for c, _ in states], seed=1)
    scales = guarded.GuardedList([s for _, s in states], seed=2)
    params = guarded.GuardedList(group.params)
    coefficients = RULES["momentum"].coefficients[case]
    pairs = list(zip(codes.arrays, scales.arrays, strict=True))
    expected = copy.deepcopy(states)
    index = _core.rules()["momentum"]["index"]
    for grads in driver.gradients(param, BLOCK_SIZES):
        _core.step_coefficients(index, params.arrays, grads, (pairs,), coefficients)
        for i, (p, g) in enumerate(zip(group.params, grads, strict=True)):
            velocity = reference.decode_blocks(*expected[i])
            reference.apply_coefficients("momentum", coefficients, p, g, (velocity,))
            expected[i] = reference.encode_blocks(velocity)
    params.check(group.params, "parameters")
    codes.check([c for c, _ in expected], "codes")
    scales.check([s for _, s in expected], "scales")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_block_with_a_nonfinite_element(bad: float) -> None:
    """Such a block decodes to NaN as a whole, its neighbours do not. Zeros have scale zero."""
    p, g = np.ones(768, np.float32), np.ones(768, np.float32)
    g[300], g[512:] = bad, 0
    codes, scales = np.zeros(768, np.int8), np.zeros(3, np.float32)
    index = _core.rules()["momentum"]["index"]
    _core.step_coefficients(index, [p], [g], ([(codes, scales)],), [0, 0, 1.0, 1.0, 0, -0.5, 0])
    assert np.isnan(scales[1])
    assert not codes[256:].any()
    assert scales[2] == 0
    assert np.all(codes[:256] == 127)
    assert scales[0] == np.float32(1) / np.float32(127)
