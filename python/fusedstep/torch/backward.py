"""Norms of gradients, taken while the backward pass brings them into cache."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from fusedstep.torch.distributed import world_size

if TYPE_CHECKING:
    from fusedstep.torch.base import Bound


class Observer:
    """Measures each gradient as soon as autograd has completed it.

    A gradient that changes afterwards (a second backward pass, a clip, an all-reduce) is measured
    again: by its own hook, or by the step, which compares objects and version counters. What
    changes gradients behind autograd's back goes unseen; DDP does, so that nothing is taken from
    the backward pass where there is more than one process.
    """

    def __init__(self, old: Observer | None, bound: Bound) -> None:
        if not bound.direct:
            raise ValueError(
                "norm_in_backward: works with dense real parameters that are no distributed "
                "tensors and have no masters; leave it out"
            )
        if old is not None:
            old.close()
        self._seen: dict[int, tuple[Any, int]] = {}
        self._plan = bound.plan
        hooks = []
        for index, leaf in enumerate(bound.leaves):
            if leaf.param.requires_grad and leaf.param.is_leaf:
                hook = _hook(weakref.ref(self), index)
                hooks.append(leaf.param.register_post_accumulate_grad_hook(hook))
        # Also called when the optimizer, and with it this object, is gone.
        self.close: Any = weakref.finalize(self, _remove, hooks)

    def observe(self, index: int, grad: Any) -> None:
        """Measures one gradient; what cannot be measured is left to the step to refuse."""
        self._seen.pop(index, None)
        try:
            self._plan.observe(index, grad)
        except (TypeError, ValueError, BufferError, RuntimeError):
            return
        # Held, so that no other tensor can come to look like it.
        self._seen[index] = (grad, grad._version)

    def complete(self, bound: Bound) -> bool:
        """Whether all gradients are measured now; what is missing or changed is measured here.

        None are kept afterwards.
        """
        seen, self._seen = self._seen, {}
        if not seen or world_size() > 1:
            return False
        for index, leaf in enumerate(bound.leaves):
            grad = leaf.param.grad
            known = seen.get(index)
            same = known is not None and known[0] is grad and known[1] == grad._version
            if grad is not None and not same:
                bound.plan.observe(index, grad)
        return True


def _remove(hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()


def _hook(observer: weakref.ref[Observer], index: int) -> Callable[[Any], None]:
    def observe(param: Any) -> None:
        living = observer()
        if living is not None and param.grad is not None:
            with torch.no_grad():
                living.observe(index, param.grad)

    return observe
