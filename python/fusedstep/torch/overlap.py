"""Whether parameters of which the core only sees dense copies have elements to themselves."""

from __future__ import annotations

from typing import Any

import numpy as np

from fusedstep.torch.leaves import Leaf, Strided, memory_of


def check_apart(leaves: list[Leaf]) -> None:
    """Elements of strided parameters are nobody else's; interleaved columns are apart.

    Raises:
        ValueError: If two elements of one parameter share memory.
        BufferError: If two parameters overlap.
    """
    if not any(isinstance(leaf, Strided) for leaf in leaves):
        return  # the core sees to it
    runs = [_runs(memory_of(leaf.param)) for leaf in leaves]
    owners = np.repeat(np.arange(len(runs)), [len(begins) for begins, _ in runs])
    begins = np.concatenate([begins for begins, _ in runs])
    ends = np.concatenate([begins + size for begins, size in runs])
    order = np.argsort(begins, kind="stable")
    meeting = np.flatnonzero(ends[order][:-1] > begins[order][1:])
    if not len(meeting):
        return
    one, other = sorted(owners[order][meeting[0] : meeting[0] + 2].tolist())
    if one == other:
        raise ValueError(
            f"{leaves[one].name}: some of its elements share memory; pass its .clone()"
        )
    raise BufferError(
        f"{leaves[one].name} and {leaves[other].name} overlap in memory; each output needs memory "
        "of its own"
    )


def _runs(memory: Any) -> tuple[Any, int]:
    """Where the runs of elements without a gap begin that a tensor consists of, and their bytes."""
    if not memory.numel():
        return np.zeros(0, np.int64), 0
    run = 1
    places = np.zeros(1, np.int64)
    for stride, size in sorted(zip(memory.stride(), memory.shape, strict=True)):
        if size > 1 and stride == run and len(places) == 1:
            run *= size
        elif size > 1:
            places = np.add.outer(places, np.arange(size) * stride).ravel()
    width = memory.element_size()
    return memory.data_ptr() + places * width, run * width
