"""What `torch.amp.GradScaler` says to an optimizer that unscales gradients by itself."""

from __future__ import annotations

from typing import Any

from fusedstep.torch.leaves import is_dtensor


def scale_of(optimizer: Any) -> tuple[float, bool | None]:
    """(factor of the gradients, whether one of them overflowed: None without a scaler).

    A scaler, or a user's own, sets the attributes `grad_scale` (None if the gradients have been
    unscaled already) and `found_inf` before the step, as for torch's fused optimizers.
    """
    attributes = vars(optimizer)
    grad_scale = attributes.get("grad_scale")
    found_inf = attributes.get("found_inf")
    if grad_scale is None and found_inf is None:
        return 1.0, None
    scale = 1.0 if grad_scale is None else 1.0 / _number(grad_scale)
    return scale, found_inf is not None and _number(found_inf) != 0.0


def _number(value: Any) -> float:
    return float(value.full_tensor() if is_dtensor(value) else value)
