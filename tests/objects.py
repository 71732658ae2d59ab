"""Optimizer objects beside the oracle: the same groups, stepped by both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import fusedstep as fs
import numpy as np
import papers
import reference
from exact import Array, mismatch

# Every class in a form that uses all of its state.
FORMS: dict[type[fs.Optimizer], dict[str, Any]] = {
    fs.SGD: {"momentum": 0.9, "dampening": 0.25},
    fs.Momentum: {"dampening": 0.25, "lr_in_velocity": True},
    fs.MomentumNesterov: {"next_momentum": 0.95},
    fs.NAdam: {"momentum_decay": 0.1},
    fs.Adam: {"amsgrad": True},
    fs.AdamW: {"betas": (0.3, 0.9)},
    fs.RMSprop: {"centered": True, "momentum": 0.5, "nesterov": True},
}
SIZES = (3, 0, 129, 16_385)


def arrays(seed: int, dtype: Any = np.float32, sizes: Sequence[int] = SIZES) -> list[Array]:
    """Random arrays."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(n).astype(dtype) for n in sizes]


def oracle(
    kind: type[fs.Optimizer], params: list[Array], *, grads: list[Array] | None = None, **given: Any
) -> reference.Group:
    """The group of arrays (copied) that an object of `kind` would update."""
    h = papers.hypers(kind, **given)
    if h.get("next_momentum", 0) is None:
        h["next_momentum"] = h["momentum"]
    declaration = kind.declaration
    rule = next(rule for rule, when in declaration.rules.items() if eval(when, {}, h))
    derived = {name: eval(text, {}, h) for name, text in declaration.derived.items()}
    coming = {"next_momentum": h.get("momentum"), "next_beta1": h.get("betas", [None])[0]}
    known = {**coming, **h, **derived}
    slots = reference.RULES[rule].slots
    limits = ("rescale_grad", "maximize", "grad_clip_norm", "grad_clip_value")
    state = [reference.arithmetic_of(p.dtype) for p in params]
    return reference.Group(
        rule,
        {name: known[name] for name in reference.RULES[rule].defaults},
        params=[p.copy() for p in params],
        grads=list(grads or []),
        slots=[
            tuple(np.zeros(p.shape, s) for _ in slots) for p, s in zip(params, state, strict=True)
        ],
        first=True,
        **{name: h[name] for name in limits},
    )


def advance(groups: Sequence[reference.Group], grads: Sequence[list[Array]]) -> Any:
    """One oracle step over all groups together; the norm and the clip coefficients."""
    for group, own in zip(groups, grads, strict=True):
        group.grads = own
    told = reference.step(groups)
    for group in groups:
        group.first = False
    return told


def check(opt: fs.Optimizer, groups: Sequence[reference.Group]) -> None:
    """Fails unless parameters, buffers, counts and products are those of the oracle."""
    entries = list(opt.state_dict()["state"].values())
    leaves = [(group, k) for group in groups for k in range(len(group.params))]
    trees = [p for group in opt.param_groups for p in group["params"]]
    assert len(trees) == len(leaves) == len(entries)
    for (group, k), p, entry in zip(leaves, trees, entries, strict=True):
        rule = reference.RULES[group.rule]
        assert not mismatch(p, group.params[k])
        assert entry["step"] == group.applied
        assert entry.get("mu_product", 1.0) == group.product
        for name, buffer in zip(rule.slots, group.slots[k], strict=True):
            assert not mismatch(entry[name], buffer), name
