"""Stub of the compiled core. Private: the public names are those of `fusedstep`."""

from collections.abc import Callable, Iterator, Sequence
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

def device(buffer: Any, name: str = "array") -> str:
    """Where an array is: "cpu", or "cuda:0" and so on. Errors name the argument `name`."""

def array_view(buffer: Any, *, writable: bool = False) -> NDArray[Any]:
    """The memory of any CPU array as a NumPy array (bfloat16 as uint16 bits); no copy."""

def to_host(buffer: Any) -> NDArray[Any]:
    """The same of an array anywhere: waits for a device, and copies what it has."""

def write(buffer: Any, values: Any) -> None:
    """`buffer[...] = values` as NumPy does it (bfloat16 as bits), for a dense array anywhere."""

def read_scalar(buffer: Any, name: str = "array") -> float:
    """The value of a 0-d or one-element buffer of a float dtype; waits for one on a device.
    Errors name the argument `name`."""

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
    settled: bool

@final
class DeviceStepResult:
    """What a step on a device did: attributes that are not known yet wait when they are read.

    Attributes:
        grad_norm: norm of all gradients after `rescale_grad`, None if nothing asked for it.
        clip_coef: min(1, grad_clip_norm / grad_norm) (the smallest, if groups differ).
        skipped: True if the step left everything as it was.
        state: dict to splat into the next functional call; {} from an optimizer object.
        grad_norms: the norm of each array, in order; None if nothing asked for one.
        settled: True once nothing has to be waited for; never, if the step was captured.
    """

    @property
    def grad_norm(self) -> float | None: ...
    @property
    def clip_coef(self) -> float: ...
    @property
    def skipped(self) -> bool: ...
    @property
    def state(self) -> dict[str, Any]: ...
    @property
    def grad_norms(self) -> NDArray[np.float64] | None: ...
    @property
    def settled(self) -> bool: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...
    def __getitem__(self, index: Any) -> Any: ...

# A row of hyper-parameters is a tuple
#     (rescale_grad, maximize, grad_clip_norm, grad_clip_value, *hypers of the rule in its order)
# of floats or bools; grad_clip_norm and grad_clip_value may be None. It is range-checked by the
# caller. For rescale_grad and lr an array of one element may stand: it is read on the device where
# the parameters are, or at once if it is elsewhere.
Row: TypeAlias = tuple[Any, ...]
# (on_nonfinite, grad_clip_scope, skip_grad_norm)
Policy: TypeAlias = tuple[str, str, float | None]

def step(
    rule: int,
    params: Any,
    grads: Any,
    states: tuple[Any, ...],
    scalars: tuple[Any, ...],
    row: Row,
    policy: Policy,
    grad_norm: Any,
    param_copy: Any,
    found_inf: Any,
    stream: Any,
    /,
) -> StepResult | DeviceStepResult:
    """One functional step. `states` has one tree (or None) per slot of the rule; a None leaf is
    created by the parameter's producer (zeros) and marks the tensor's first step. `scalars` are
    those of the rule, before the step: numbers, or arrays on the device of the parameters."""

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

def sum_squares(grads: Any, *, stream: Any = None) -> float: ...

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
        grad_norm: Any,
        param_copy: Sequence[Any] | None,
        observed: bool = False,
        found_inf: Any = None,
        grad_scale: Any = None,
        stream: Any = None,
    ) -> StepResult | DeviceStepResult:
        """`grads[k]` mirrors `trees[k]`; None reads what was accumulated, if anything was, else
        each leaf's `.grad`. `rows` are (rule, row). `observed`: each of the gradients has been
        given to `observe` since it last changed. `found_inf`: not 0 skips the step; `grad_scale`
        divides all gradients before `rescale_grad`. Both, and `grad_norm`, are numbers or arrays of
        one element, which are read where the parameters are."""
    def take_counts(self) -> tuple[int, int]:
        """Steps on devices that were applied and skipped since this was last asked. Waits if
        `unsure`."""
    @property
    def unsure(self) -> bool:
        """Whether a device may have skipped steps, or replayed some, since it was last asked."""
    def observe(self, index: int, grad: Any, stream: Any = None) -> None:
        """Measures the gradient of a leaf for the norm of the next step."""
    def accumulate(self, grads: Sequence[Any] | None, scale: float, stream: Any = None) -> None:
        """Adds scale * gradients to the buffers that the next `step(None, ...)` reads."""
    def has_accumulated(self) -> bool: ...
    def zero_grad(self, set_to_none: bool) -> None: ...
