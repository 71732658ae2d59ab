"""What the kernels update for a parameter: its own memory, its shard's, or a stand-in for it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

from fusedstep.buffers import state_dtype
from fusedstep.ranges import shown

# Not in checkpoints of torch.optim, which keeps no such copy.
MASTER = "master_param"


def is_dtensor(tensor: Any) -> bool:
    """A distributed tensor; torch.distributed is not imported to find out."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_flat(param: Any) -> bool:
    """A flat parameter of FullyShardedDataParallel (FSDP1), or a part of one."""
    return bool(getattr(param, "_fsdp_flattened", False))


def memory_of(tensor: Any) -> Any:
    """The plain real tensor that holds the (local) elements of a parameter, gradient or state."""
    if is_dtensor(tensor):
        tensor = tensor.to_local()
        if hasattr(tensor, "trigger_wait"):  # still on its way from other processes
            tensor = tensor.trigger_wait()
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj().resolve_neg())
    return tensor


def zeros_like(param: Any, name: str | None = None) -> Any:
    """A state of zeros with a parameter's form, strides and sharding; float32 for 16-bit ones.

    Args:
        param: The parameter.
        name: A dtype's name, where it is known; None picks that of a state.
    """
    dtype = name or state_dtype(str(param.dtype).removeprefix("torch."))
    return torch.zeros_like(
        param,
        dtype=getattr(torch, dtype),
        memory_format=torch.preserve_format,
        requires_grad=False,
    )


def check_spread(param: Any, name: str, buffer: Any) -> None:
    """A state is distributed, or not, like its parameter."""
    if is_dtensor(param) != is_dtensor(buffer):
        raise ValueError(
            f"state: {name} is {'whole' if is_dtensor(param) else 'distributed'}, unlike its "
            "parameter; get_optimizer_state_dict and set_optimizer_state_dict of "
            "torch.distributed.checkpoint.state_dict gather and distribute"
        )


def _form(memory: Any) -> tuple[Any, ...]:
    """What may not change under a registered tensor."""
    strides = memory.stride() if memory.layout is torch.strided else memory.layout
    return memory.device, memory.dtype, memory.shape, strides


def fitted(param: Any, name: str, buffer: Any) -> Any:
    """A state buffer in the memory order of its parameter's; itself if it has it already.

    Raises:
        TypeError: If it is no tensor.
        ValueError: If it has another shape.
    """
    if not isinstance(buffer, torch.Tensor):
        raise TypeError(f"state: {name} is {shown(buffer)}, no tensor")
    if buffer.shape != param.shape:
        raise ValueError(
            f"state: {name} has shape {tuple(buffer.shape)}, its parameter {tuple(param.shape)}"
        )
    check_spread(param, name, buffer)
    made = zeros_like(param)
    widened = made.dtype == torch.float64 and buffer.dtype != torch.float64
    if not widened and buffer.stride() == made.stride():
        return buffer
    dtype = made.dtype if widened else buffer.dtype
    return made.to(dtype).copy_(buffer)


def _is_dense(tensor: Any) -> bool:
    """Its elements fill one block of memory: only then does a tensor like it get its strides."""
    return tensor.is_contiguous() or torch.empty_like(tensor, device="meta").stride() == (
        tensor.stride()
    )


class Leaf:
    """A parameter as the compiled core sees it.

    Attributes:
        param: The parameter.
        name: Where it stands in the groups, as messages say it.
        target: The tensor that is registered with the core and updated by it.
        wrapped: State buffers as `Optimizer.state` shows them, by torch's names.
        published: The progress that `Optimizer.state` was last brought up to date with.
    """

    direct = False  # the core may read `param` and `param.grad` by itself
    name = ""
    published: tuple[int, float] | None = None

    def __init__(self, param: Any) -> None:
        self.param = param
        self.target = memory_of(param)
        self.wrapped: dict[str, Any] = {}

    @property
    def stale(self) -> bool:
        """The parameter's elements lie elsewhere than when the leaf was made."""
        current = memory_of(self.param)
        return current is not self.target and (
            current.data_ptr() != self.target.data_ptr() or _form(current) != _form(self.target)
        )

    @property
    def sharded(self) -> bool:
        """Other processes hold the rest of the parameter."""
        return is_dtensor(self.param) or is_flat(self.param)

    def gradient(self, given: Mapping[int, Any] | None) -> Any:
        """The parameter's gradient, or the one given by its id, shaped like `target`; or None."""
        grad = self.param.grad if given is None else given.get(id(self.param))
        if grad is None:
            return None
        if is_dtensor(grad) and grad.placements != self.param.placements:
            if grad.device_mesh != self.param.device_mesh:
                raise ValueError(
                    f"{self.name}.grad is on another device mesh than its parameter; "
                    "redistribute it"
                )
            grad = grad.redistribute(placements=self.param.placements)  # partial sums, say
        return memory_of(grad).resolve_neg()

    def copy(self) -> Any:
        """A tensor that receives the new values, rounded once; or None."""
        return None

    def refresh(self) -> None:
        """Before a step: takes over what others wrote into the parameter."""

    def written(self) -> None:
        """After a step that was applied."""
        if self.target is not self.param:
            torch.autograd.graph.increment_version(self.param)

    def wrap(self, name: str, buffer: Any) -> Any:
        """A state buffer of the core in the form of the parameter; the same object each time."""
        known = self.wrapped.get(name)
        if known is not None and memory_of(known).data_ptr() == buffer.data_ptr():
            return known
        if self.param.is_complex():
            buffer = torch.view_as_complex(buffer)
        if is_dtensor(self.param):
            buffer = type(self.param).from_local(
                buffer,
                self.param.device_mesh,
                self.param.placements,
                run_check=False,
                shape=self.param.shape,
                stride=self.param.stride(),
            )
        self.wrapped[name] = buffer
        return buffer


class Direct(Leaf):
    """An ordinary parameter: nothing is to be done around the core."""

    direct = True

    def __init__(self, param: Any) -> None:
        self.param = self.target = param
        self.wrapped = {}
        self._form = _form(param)

    @property
    def stale(self) -> bool:
        """The parameter has got memory of another form (its place alone does not matter)."""
        return _form(self.param) != self._form

    def written(self) -> None:
        """The core tells autograd itself."""

    def wrap(self, _name: str, buffer: Any) -> Any:
        """As it is."""
        return buffer


class Strided(Leaf):
    """A parameter whose elements do not fill one block: a dense copy is updated and copied back."""

    def __init__(self, param: Any) -> None:
        super().__init__(param)
        self._memory = self.target  # may be the parameter itself
        self._form, self._place = _form(self._memory), self._memory.data_ptr()
        self.target = torch.empty_like(self._memory, memory_format=torch.preserve_format)

    @property
    def stale(self) -> bool:
        """The parameter has got other memory, which may overlap with another's."""
        current = memory_of(self.param)
        return current.data_ptr() != self._place or _form(current) != self._form

    def refresh(self) -> None:
        """Reads the parameter."""
        self._memory = memory_of(self.param)
        self.target.copy_(self._memory)

    def written(self) -> None:
        """Writes it."""
        self._memory.copy_(self.target)
        super().written()


def _is_master(param: Any, kept: Any) -> bool:
    """A tensor of a state that can be updated, as it is, in place of a 16-bit parameter."""
    if not (type(kept) is torch.Tensor or is_dtensor(kept)) or kept.requires_grad:
        return False
    if is_dtensor(kept) != is_dtensor(param) or kept.shape != param.shape:
        return False
    if is_dtensor(param) and (
        kept.device_mesh != param.device_mesh or kept.placements != param.placements
    ):
        return False
    memory, own = memory_of(kept), memory_of(param)
    like = torch.empty_like(own, dtype=torch.float32, device="meta")
    return memory.device == own.device and _form(memory)[1:] == _form(like)[1:]


class Master(Leaf):
    """A 16-bit parameter with a float32 master, which is updated; the parameter gets it rounded."""

    def __init__(self, param: Any, kept: Any = None) -> None:
        super().__init__(param)
        self._memory = self.target  # may be the parameter itself
        self._form = _form(self._memory)
        if _is_master(param, kept):
            self.master = kept
            self._version = (-1, -1, -1)  # the parameter may hold something else
        else:
            self.master = zeros_like(param, "float32").copy_(param)
            self._version = self._current_versions()
        self.target = memory_of(self.master)
        self.wrapped[MASTER] = self.master

    def _current_versions(self) -> tuple[int, int, int]:
        """Of the parameter; of its shard, which checkpoints are loaded into; and where that is."""
        return self.param._version, self._memory._version, self._memory.data_ptr()

    def restart(self, master: Any) -> None:
        """Goes on from the values of one that stands in a state; None: from the parameter."""
        if master is not self.master:
            given = self.param if master is None else fitted(self.param, MASTER, master)
            self.master.copy_(given)
            self._version = (-1, -1, -1)  # the parameter may hold something else

    @property
    def stale(self) -> bool:
        """The parameter has got memory of another form (its place alone does not matter)."""
        return _form(memory_of(self.param)) != self._form

    def copy(self) -> Any:
        """The parameter."""
        return self._memory

    def refresh(self) -> None:
        """Takes over what others wrote: where the parameter is not its rounded master any more."""
        self._memory = memory_of(self.param)
        if self._current_versions() == self._version:
            return
        rounded = self.target.to(self._memory.dtype)
        self.target.copy_(torch.where(rounded == self._memory, self.target, self._memory.float()))
        self._version = self._current_versions()

    def written(self) -> None:
        """The core has told autograd, of the tensor it wrote."""
        if self._memory is not self.param:
            torch.autograd.graph.increment_version(self.param)
        self._version = self._current_versions()


def make_leaf(param: Any, name: str, master: bool, kept: Any = None) -> Leaf:
    """The leaf of a parameter.

    Args:
        param: The parameter.
        name: What messages call it.
        master: A 16-bit parameter gets a master.
        kept: The master that stands in its state, which goes on to be it if it can.
    """
    if is_dtensor(param) and any(placement.is_partial() for placement in param.placements):
        raise ValueError(
            f"{name} is a partial sum: no process holds its elements; redistribute it first"
        )
    leaf = _make_leaf(param, name, master, kept)
    leaf.name = name
    return leaf


def _make_leaf(param: Any, name: str, master: bool, kept: Any) -> Leaf:
    if param.layout is not torch.strided:
        layout = str(param.layout).removeprefix("torch.")
        raise TypeError(
            f"{name} is {layout}, which has no memory of all its elements; make it dense"
        )
    if param.is_conj() or param.is_neg():
        raise ValueError(
            f"{name} is a lazily conjugated or negated view, whose memory holds other values; pass "
            "its .resolve_conj().resolve_neg()"
        )
    memory = memory_of(param)
    if any(
        size > 1 and not stride for size, stride in zip(memory.shape, memory.stride(), strict=True)
    ):
        raise ValueError(
            f"{name} is expanded: several of its elements share memory; pass its .clone()"
        )
    half = param.dtype in {torch.float16, torch.bfloat16}
    if not _is_dense(memory):
        if master and half:
            raise ValueError(f"{name}: a master needs a dense parameter; pass its .contiguous()")
        return Strided(param)
    if master and half:
        return Master(param, kept)
    return Direct(param) if memory is param and not is_flat(param) else Leaf(param)
