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
    changes gradients behind autograd's back goes unseen: a write through `.grad.data`, a scaler's
    `unscale_` that no `scaler.step` follows. DDP does so, too: nothing is taken from the backward
    pass where there is more than one process.
    """

    def __init__(self, old: Observer | None, bound: Bound) -> None:
        if not bound.direct:
            raise ValueError(
                "norm_in_backward: works with dense real parameters that are no distributed "
                "tensors and have no masters; leave it out"
            )
        if old is not None:
            old.close()
        # Weak, so that no gradient lives longer for it, and none can come to look like another.
        self._seen: dict[int, tuple[weakref.ref[Any], tuple[int, ...]]] = {}
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
        if world_size() > 1:
            return
        try:
            self._plan.observe(index, grad)
        except (TypeError, ValueError, BufferError, RuntimeError):
            return
        self._seen[index] = (weakref.ref(grad), _look(grad))

    def forget(self) -> None:
        """What has been measured is not true any more."""
        self._seen = {}

    def complete(self, bound: Bound) -> bool:
        """Whether all gradients are measured now; what is missing or changed is measured here.

        None are known afterwards.
        """
        seen, self._seen = self._seen, {}
        if not seen or world_size() > 1:
            return False
        for index, leaf in enumerate(bound.leaves):
            grad = leaf.param.grad
            if grad is None:
                continue
            known, look = seen.get(index, (None, ()))
            if look != _look(grad) or known is None or known() is not grad:
                bound.plan.observe(index, grad)
        return True


def _look(grad: Any) -> tuple[int, ...]:
    """What changes when somebody writes a gradient, or gives it other memory."""
    return grad._version, grad.data_ptr(), grad.numel()


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
