"""Small steps on a GPU with the CPU's bits: few and quick enough to run under compute-sanitizer.

`make gpu` runs them under its memcheck, racecheck and initcheck, too.
"""

from __future__ import annotations

from typing import Any

import fusedstep as fs
import pytest

try:
    import torch
except ImportError:  # the marker leaves the tests out, by name
    torch = None

pytestmark = [pytest.mark.framework("torch"), pytest.mark.gpu]

DEVICE = "cuda"
# Around vectors, tiles and chunks; every tensor of odd size moves the next one off 16 bytes.
SIZES = (1, 7, 16, 33, 1025, 16383, 16385, 2 * 16384 + 5)
INTEGERS = {"float32": "int32", "bfloat16": "int16", "float64": "int64"}


def tensors(dtype: str, device: str, seed: int) -> list[Any]:
    """Views of one allocation, one after the other, the first one element behind its beginning."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(1 + sum(SIZES), generator=generator).to(getattr(torch, dtype)).to(device)
    return list(flat[1:].split(SIZES))


def bits(arrays: list[Any], dtype: str) -> list[list[int]]:
    return [a.cpu().view(getattr(torch, INTEGERS[dtype])).tolist() for a in arrays]


def run(kind: type[fs.Optimizer], dtype: str, device: str, **options: Any) -> tuple[Any, ...]:
    """Parameters, norms and counts after four steps, the second of which is skipped."""
    params = tensors(dtype, device, 0)
    opt = kind(params, lr=0.01, weight_decay=0.01, on_nonfinite="skip", **options)
    norms = []
    for step in range(4):
        grads = tensors(dtype, device, 1 + step)
        if step == 1:
            grads[2][3] = float("inf")
        result = opt.step(grads)
        norms.append((result.grad_norm, result.skipped))
    return bits(params, dtype), norms, opt.skipped_steps


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("name", ["SGD", "MomentumNesterov", "NAdam", "RMSprop"])
def test_steps(name: str, dtype: str) -> None:
    kind = getattr(fs, name)
    options = {"grad_clip_norm": 3.0}
    expected = run(kind, dtype, "cpu", **options)
    assert expected[2] == 1
    assert run(kind, dtype, DEVICE, **options) == expected


def test_functions() -> None:
    """Without a norm: one launch, and state that is made on the device."""
    results = []
    for device in ("cpu", DEVICE):
        params, state = tensors("float32", device, 0), {}
        for step in range(3):
            grads = tensors("float32", device, 1 + step)
            state = fs.fused_nadam_step(params, grads, **state, lr=0.01).state
        results.append(bits([*params, *state["exp_avg"], *state["exp_avg_sq"]], "float32"))
    assert results[0] == results[1]
