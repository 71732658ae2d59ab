"""Jobs of test_torch_distributed.py that save, reshard, die and resume."""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from distributed_jobs import RULES, full, placed, raised
from fsdp_jobs import loss_of, make_model, shard
from fusedstep import torch as optim
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "SGD": ("SGD", torch.float32, RULES["SGD"]),
    "SGD without state": ("SGD", torch.float32, {"lr": 0.1}),
    "AdamW": ("AdamW", torch.float32, RULES["AdamW"]),
    "NAdam": ("NAdam", torch.float32, RULES["NAdam"]),
    "masters": ("AdamW", torch.bfloat16, {"lr": 1e-3, "master_weights": True}),
}


class Run:
    """A sharded model whose gradients depend on the step alone, not on the number of processes."""

    def __init__(self, case: str, library: Any = optim) -> None:
        rule, dtype, settings = CASES[case]
        self.model = make_model().to(dtype)
        self.model.unused.requires_grad_(False)
        shard(self.model, "plain")
        if library is optim:
            settings = {**settings, "grad_clip_value": 0.05, "grad_clip_norm": 1e9}
        self.optimizer = getattr(library, rule)(self.model.parameters(), **settings)
        self.params = [p for p in self.model.parameters() if p.requires_grad]

    def advance(self, first: int, last: int, limit: float = 1.0) -> None:
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            for param in self.params:
                grad = 0.1 * torch.randn(param.shape, generator=generator, dtype=torch.float64)
                where = (param.device_mesh, param.placements)
                param.grad = placed(grad.clamp(-limit, limit).to(param.dtype), where)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def bits(self) -> dict[str, Any]:
        """All parameters and states, whole."""
        found: dict[str, Any] = {}
        for name, param in self.model.named_parameters():
            found[name] = bits(param)
            for key, value in self.optimizer.state.get(param, {}).items():
                found[f"{name}.{key}"] = bits(value)
        return found


def bits(tensor: Any) -> bytes:
    whole = full(tensor)
    return whole.view(torch.int16 if whole.itemsize == 2 else whole.dtype).numpy().tobytes()


# --- state dicts ------------------------------------------------------------------------------

OPTIONS = {
    "sharded": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True),
    "from rank 0": StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
}


def state_dicts(rank: int, case: str) -> None:
    """A fresh optimizer goes on with the same bits; what torch does to start it changes nothing."""
    for name, options in OPTIONS.items():
        if case == "SGD without state" and options.full_state_dict:
            continue  # torch 2.13 wants some state, also for its own SGD
        old, new = Run(case), Run(case)
        old.advance(0, 3)
        saved = get_optimizer_state_dict(old.model, old.optimizer, options=options)
        for tensor in torch.utils._pytree.tree_leaves(saved):
            sharded = isinstance(tensor, DTensor)
            assert not sharded or "full" not in name
        untouched = [bits(p) for p in new.params]
        if name == "from rank 0" and rank > 0:
            saved = {}
        set_optimizer_state_dict(new.model, new.optimizer, saved, options=options)
        assert [bits(p) for p in new.params] == untouched
        for param in new.params:
            for key, value in new.optimizer.state.get(param, {}).items():
                assert isinstance(value, DTensor) == (key not in {"step", "mu_product"}), key
        with torch.no_grad():
            for mine, other in zip(new.params, old.params, strict=True):
                mine.copy_(other)
        old.advance(3, 6)
        new.advance(3, 6)
        assert new.bits() == old.bits(), name


def with_torch(rank: int) -> None:
    """Checkpoints of torch.optim under FSDP2 go on here, and ours there."""
    del rank
    for case in ("SGD", "AdamW", "NAdam"):
        for name in ("sharded", "full"):
            for first, second in ((torch.optim, optim), (optim, torch.optim)):
                old, new = Run(case, first), Run(case, second)
                old.advance(0, 3, limit=0.05)
                options = OPTIONS[name]
                saved = get_optimizer_state_dict(old.model, old.optimizer, options=options)
                saved = copy.deepcopy(saved)  # torch would go on with the same buffers
                if name == "full":
                    drop_what_lacks(saved, new.optimizer)
                set_optimizer_state_dict(new.model, new.optimizer, saved, options=options)
                with torch.no_grad():
                    for mine, other in zip(new.params, old.params, strict=True):
                        mine.copy_(other)
                old.advance(3, 6, limit=0.05)
                new.advance(3, 6, limit=0.05)
                for mine, other in zip(new.params, old.params, strict=True):
                    torch.testing.assert_close(full(mine), full(other), rtol=1e-6, atol=1e-7)
                    assert case != "SGD" or torch.equal(full(mine), full(other))
    old = Run("AdamW")
    old.advance(0, 1)
    saved = old.optimizer.state_dict()
    saved["state"][0]["exp_avg"] = full(saved["state"][0]["exp_avg"])
    assert "set_optimizer_state_dict" in raised(ValueError, old.optimizer.load_state_dict, saved)


def drop_what_lacks(saved: dict[str, Any], optimizer: Any) -> None:
    """torch 2.13 raises KeyError for keys of a full state dict that an optimizer's groups lack."""
    for group in saved["param_groups"]:
        for key in group.keys() - optimizer.param_groups[0].keys():
            del group[key]


# --- files ------------------------------------------------------------------------------------


def save(rank: int, folder: str, case: str) -> dict[str, Any]:
    """Saves after three steps; returns where three more lead."""
    del rank
    run = Run(case)
    run.advance(0, 3)
    model, optimizer = get_state_dict(run.model, run.optimizer)
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
    run.advance(3, 6)
    return run.bits()


def resume(rank: int, folder: str, case: str) -> dict[str, Any]:
    """Loads on any number of processes, and goes on."""
    del rank
    run = Run(case)
    load(run.model, run.optimizer, folder)
    run.advance(3, 6)
    return run.bits()


def load(model: Any, optimizer: Any, folder: str, **more: Any) -> None:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    state = {"model": of_model, "optimizer": of_optimizer, **more}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=of_model, optim_state_dict=state["optimizer"])


def train(rank: int, folder: str, steps: int, dies_at: int | None) -> Any:
    """Training that saves after every second step and goes on from the last save there is.

    At step `dies_at` the last process is killed, when the gradients are there.
    """
    model = make_model()
    model.unused.requires_grad_(False)
    place, parts = shard(model, "plain")
    optimizer = optim.NAdam(model.parameters(), lr=0.02, grad_clip_norm=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    places = sorted(Path(folder).glob("step*/.metadata"))
    begin = int(places[-1].parent.name[4:]) if places else 0
    if places:
        load(model, optimizer, str(places[-1].parent), scheduler=scheduler)
    for step in range(begin, steps):
        loss_of(model, step, place, parts).backward()
        if step == dies_at and rank == parts - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            optimizer.step()
        except RuntimeError:  # the others hear of it
            assert step == dies_at
            return "lost a process"
        assert optimizer.last.clip_coef < 1
        optimizer.zero_grad()
        scheduler.step()
        if step % 2:
            of_model, of_optimizer = get_state_dict(model, optimizer)
            state = {"model": of_model, "optimizer": of_optimizer, "scheduler": scheduler}
            dcp.save(state, checkpoint_id=str(Path(folder) / f"step{step + 1}"))
    return begin, [bits(p) for p in model.parameters()], scheduler.get_last_lr()
