"""What `torch.amp.GradScaler` says to an optimizer that unscales gradients by itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fusedstep.torch.leaves import is_dtensor


class Scaling(NamedTuple):
    """What a scaler has said. Tensors on a GPU stay there, where the step reads them.

    Attributes:
        grad_scale: Divides the gradients, a number or a tensor of one; None: they are as they are.
        found_inf: Not 0 if one of them overflowed, a number or a tensor of one; None: none did.
    """

    grad_scale: Any
    found_inf: Any

    @property
    def unscaled(self) -> bool:
        """There is a scaler, and it has divided the gradients by itself."""
        return self.grad_scale is None and self.found_inf is not None

    @property
    def overflow(self) -> bool | None:
        """Whether a gradient overflowed; None without a scaler. Waits for a tensor on a GPU."""
        if self.grad_scale is None and self.found_inf is None:
            return None
        return self.found_inf is not None and float(self.found_inf) != 0.0

    @property
    def factor(self) -> float:
        """What multiplies the gradients. Waits for a tensor on a GPU."""
        return 1.0 if self.grad_scale is None else 1.0 / float(self.grad_scale)


NOTHING = Scaling(None, None)


def said_to(optimizer: Any) -> Scaling:
    """What a scaler, or a user's own, has left at an optimizer, as for torch's fused ones.

    It sets the attributes `grad_scale` (None if the gradients have been unscaled already) and
    `found_inf` before the step.
    """
    attributes = vars(optimizer)
    return Scaling(_local(attributes.get("grad_scale")), _local(attributes.get("found_inf")))


def _local(value: Any) -> Any:
    """A number as the core takes it: a Python one, or a floating-point tensor of this process."""
    if not isinstance(value, torch.Tensor):
        return value
    if is_dtensor(value):
        value = value.full_tensor()  # takes all processes
    return value if value.is_floating_point() else value.double()
