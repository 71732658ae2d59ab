"""Stub of the compiled core. Private: the public names are those of `fusedstep`."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, final

import numpy as np
from numpy.typing import NDArray

class InternalError(RuntimeError): ...

_C_API: object  # a capsule: the function table for the modules compiled apart (core/c_api.hpp)

# --- rules and instruction sets ---------------------------------------------------------------

def rules() -> dict[str, dict[str, Any]]:
    """name -> {"index": int, "slots", "scalars", "hypers", "coefficients": (...)}."""

def build_info() -> dict[str, Any]: ...
def active_isa() -> str: ...
def available_isas() -> list[str]: ...
def force_isa(name: str | None) -> None: ...

# --- threads ----------------------------------------------------------------------------------

def get_num_threads() -> int: ...
def set_num_threads(threads: int) -> None: ...
def thread_runtime() -> str: ...

# --- buffers ----------------------------------------------------------------------------------

def set_producer_lookup(lookup: Callable[[type], Any]) -> None:
    """`lookup(type)` returns a `fusedstep.buffers.Producer`; asked once per exact type."""

def describe(buffer: Any) -> tuple[tuple[int, ...], str]:
    """Shape and dtype name of one array; TypeError if it is none."""

def array_view(buffer: Any, *, writable: bool = False) -> NDArray[Any]:
    """The memory of any CPU array as a NumPy array (bfloat16 as uint16 bits); no copy."""

def read_scalar(buffer: Any) -> float:
    """The value of a 0-d or one-element CPU buffer of a float dtype."""

def is_array(obj: object) -> bool: ...

# --- trees ------------------------------------------------------------------------------------

def flatten(tree: Any, name: str = "params") -> list[tuple[tuple[str | int, ...], Any]]:
    """[(path, leaf), ...] in call order. Errors name the argument `name`."""

# --- one step ---------------------------------------------------------------------------------

@final
class StepResult:
    """What a step did.

    Attributes:
        grad_norm: norm of all gradients after `rescale_grad`, None if nothing asked for it.
        clip_coef: min(1, grad_clip_norm / grad_norm) (the smallest, if groups differ).
        skipped: True if `on_nonfinite="skip"` or `skip_grad_norm` skipped the step.
        state: dict to splat into the next functional call; {} from an optimizer object.
        grad_norms: the norm of each array, in order; None if nothing asked for one.
    """

    def __new__(cls, fields: tuple[Any, ...], /) -> StepResult:
        """The five values in this order; for steps that are decided before the core is called."""

    grad_norm: float | None
    clip_coef: float
    skipped: bool
    state: dict[str, Any]
    grad_norms: NDArray[np.float64] | None

# A row of hyper-parameters is a tuple
#     (rescale_grad, maximize, grad_clip_norm, grad_clip_value, *hypers of the rule in its order)
# of floats or bools; grad_clip_norm and grad_clip_value may be None. It is range-checked by the
# caller.
Row: TypeAlias = tuple[Any, ...]
# (on_nonfinite, grad_clip_scope, skip_grad_norm)
Policy: TypeAlias = tuple[str, str, float | None]

def step(
    rule: int,
    params: Any,
    grads: Any,
    states: tuple[Any, ...],
    scalars: tuple[float, ...],
    row: Row,
    policy: Policy,
    grad_norm: float | None,
    param_copy: Any,
    /,
) -> StepResult:
    """One functional step. `states` has one tree (or None) per slot of the rule; a None leaf is
    created by the parameter's producer (zeros) and marks the tensor's first step. `scalars` are
    those of the rule, before the step."""

def step_coefficients(
    rule: int,
    params: Any,
    grads: Any,
    states: tuple[Any, ...],
    coefficients: Sequence[float],
    /,
) -> None:
    """Drives a rule by raw coefficients (tests): no clip, no norm, `prepare` is not called. A state
    may be a pair (int8 codes, float32 scales): the block-wise storage policy."""

def sum_squares(grads: Any, /) -> float: ...

@final
class Plan:
    """The leaves of an optimizer: parameters, their state and step counts, bound to the user's
    trees (a rebound or restructured tree is detected at the next step)."""

    def __init__(self, trees: Sequence[Any], names: Sequence[str], slots: Sequence[str]) -> None:
        """`names[k]` is how messages call `trees[k]`: "params", "params[1]['params']". `slots`
        names all state buffers that the rules of `step` may have."""
    def __len__(self) -> int: ...
    def leaf(self, index: int) -> Any: ...
    def tree(self, index: int) -> int:
        """Which of `trees` the leaf is in."""
    def path(self, index: int) -> tuple[str | int, ...]:
        """Keys from the root of its tree to the leaf; () if the tree is one array."""
    def get_row(self, index: int) -> int: ...
    def set_row(self, index: int, row: int) -> None:
        """Which of the rows given to `step` the leaf uses (default: its tree's index)."""
    def get_state(self, index: int) -> dict[str, Any]:
        """State buffers by slot; {} before the first applied step. From then on each step asks
        them for their memory, and tells their library that they were written."""
    def set_state(self, index: int, buffers: dict[str, Any]) -> None:
        """Checks dtype, shape, strides, writability like a step would."""
    def get_progress(self, index: int) -> tuple[int, float]:
        """Applied steps, and the running product of the rule's factors (1.0 if it has none)."""
    def set_progress(self, index: int, steps: int, product: float) -> None: ...
    def step(
        self,
        grads: Sequence[Any] | None,
        rows: Sequence[tuple[int, Row]],
        policy: Policy,
        grad_norm: float | None,
        param_copy: Sequence[Any] | None,
        observed: bool = False,
    ) -> StepResult:
        """`grads[k]` mirrors `trees[k]`; None reads what was accumulated, if anything was, else
        each leaf's `.grad`. `rows` are (rule, row). `observed`: each of the gradients has been
        given to `observe` since it last changed."""
    def observe(self, index: int, grad: Any) -> None:
        """Measures the gradient of a leaf for the norm of the next step."""
    def accumulate(self, grads: Sequence[Any] | None, scale: float, /) -> None:
        """Adds scale * gradients to the buffers that the next `step(None, ...)` reads."""
    def has_accumulated(self) -> bool: ...
    def zero_grad(self, set_to_none: bool) -> None: ...
