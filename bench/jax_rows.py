"""The rows of `fusedstep.jax`: whole compiled steps with donated arrays, beside optax."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import fusedstep as fs
import numpy as np

from bench.bars import JAX, OPTAX
from bench.measure import Row, Sampler, timed
from bench.methods import BETA1, BETA2, DECAY, EPS, LR, MOMENTUM

if TYPE_CHECKING:
    from bench.setting import Setting

HAS_JAX = bool(find_spec("jax") and find_spec("optax"))

STEPS = 3  # before anything is timed
# Far beyond what makes the momentum of our NAdam warm up within a step: optax's is constant.
WARM = 1e6

Arrays = list[Any]


class Model:
    """Parameters and gradients of many leaves, and the two ways to update them."""

    def __init__(self, leaves: int, numel: int, adaptive: bool = False) -> None:
        rng = np.random.default_rng(0)
        self.start = [rng.standard_normal(numel, dtype=np.float32) for _ in range(leaves)]
        self.grads = [rng.standard_normal(numel, dtype=np.float32) for _ in range(leaves)]
        self.adaptive = adaptive
        self.extent = f"{leaves} x {numel:,}"
        # Always active; not by so much that decay cancels gradients, of which NAdam sees the sign.
        self.clip = sum(float(np.vdot(g, g)) for g in self.grads) ** 0.5 / 2
        options = {"lr": LR, "weight_decay": DECAY, "grad_clip_norm": self.clip}
        betas = {"betas": (BETA1, BETA2), "eps": EPS, "momentum_decay": WARM}
        self.options = options | (betas if adaptive else {"momentum": MOMENTUM})

    def ours(self) -> tuple[Any, Any]:
        """(init, step)."""
        import fusedstep.jax as fj

        tx = (fj.nadam if self.adaptive else fj.nesterov)(**self.options)
        return tx.init, tx.step

    def optax(self) -> tuple[Any, Any]:
        """(init, step)."""
        return optax_chain(self.clip, self.adaptive)

    def expected(self) -> Arrays:
        """The parameters after a few steps of the NumPy path, which the oracle has judged."""
        params = [p.copy() for p in self.start]
        state: dict[str, Any] = {}
        step = fs.fused_nadam_step if self.adaptive else fs.fused_nesterov_step
        for _ in range(STEPS):
            state = step(params, self.grads, **state, **self.options).state
        return params


@cache
def optax_chain(clip: float | None, adaptive: bool) -> tuple[Any, Any]:
    """(init, step), as optax's documentation writes it."""
    import optax

    descent = optax.sgd(LR, momentum=MOMENTUM, nesterov=True)
    if adaptive:
        descent = optax.nadam(LR, b1=BETA1, b2=BETA2, eps=EPS)
    first = [] if clip is None else [optax.clip_by_global_norm(clip)]
    tx = optax.chain(*first, optax.add_decayed_weights(DECAY), descent)

    def step(grads: Arrays, state: Any, params: Arrays) -> tuple[Arrays, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx.init, step


@cache
def compiled(step: Any) -> Any:
    """A step that is made once is compiled once."""
    import jax

    # Parameters before state, going in and coming out: in another order XLA would copy optax's.
    return jax.jit(lambda p, s, g: step(g, s, p), donate_argnums=(0, 1))


class Contender:
    """One of the two, with arrays of its own."""

    def __init__(self, start: Arrays, grads: Arrays, init: Any, step: Any) -> None:
        import jax
        import jax.numpy as jnp

        self._wait = jax.block_until_ready
        self._step = compiled(step)
        self._grads = [jnp.array(g) for g in grads]
        self.params = [jnp.array(p) for p in start]
        self._state = init(self.params)

    def queue(self) -> None:
        self.params, self._state = self._step(self.params, self._state, self._grads)

    def wait(self) -> None:
        self._wait((self.params, self._state))

    def run(self) -> None:
        self.queue()
        self.wait()


def _verify(model: Model, contenders: dict[str, Contender]) -> dict[str, float]:
    """Ours to the bit; optax's difference in parts of the largest change."""
    for contender in contenders.values():
        for _ in range(STEPS):
            contender.run()
    expected, differences = model.expected(), {}
    change = max(float(np.max(np.abs(a - b))) for a, b in zip(expected, model.start, strict=True))
    for name, contender in contenders.items():
        pairs = list(zip(map(np.asarray, contender.params), expected, strict=True))
        difference = max(float(np.max(np.abs(a - b))) for a, b in pairs) / change
        if name == JAX and not all(a.tobytes() == b.tobytes() for a, b in pairs):
            raise AssertionError(f"{name}: not the bits of the NumPy path, by {difference:g}")
        # Roundings of the parameters, of a float32 norm, and of 1 - beta2^t in float32.
        if not difference < 1e-2:
            raise AssertionError(f"{name}: differs from {JAX} by {difference:g} of the change")
        if name != JAX:
            differences[name] = difference
    return differences


def _row(name: str, what: str, model: Model, nbytes: int) -> Row:
    contenders = {
        JAX: Contender(model.start, model.grads, *model.ours()),
        OPTAX: Contender(model.start, model.grads, *model.optax()),
    }
    differences = _verify(model, contenders)
    samplers = {who: timed(contender.run) for who, contender in contenders.items()}
    elements = len(model.start) * model.start[0].size
    title = f"{what} + decay + global clip, {model.extent}"
    return Row(name, title, samplers, {JAX: nbytes * elements}, differences)


def nesterov(setting: Setting, leaves: int) -> Row:
    """One leaf of twice the size of other rows (67 M), or many."""
    total = setting.scale.large * (2 if leaves == 1 else 1)
    model = Model(leaves, total // leaves)
    return _row(f"jax-{leaves}", "JAX, Nesterov", model, 24)


def small(setting: Setting) -> Row:
    return _row("jax-1000", "JAX, Nesterov", Model(setting.scale.many, 1000), 24)


def nadam(setting: Setting) -> Row:
    model = Model(1, 2 * setting.scale.large, adaptive=True)
    return _row("jax-nadam", "JAX, NAdam", model, 32)


def compile_time(setting: Setting) -> Row:
    """Of many leaves. optax is left out: it takes several times as long, in every round."""
    import jax

    model = Model(setting.scale.many, 1000)
    init, step = model.ours()
    params = [jax.ShapeDtypeStruct(p.shape, p.dtype) for p in model.start]
    state = jax.eval_shape(init, params)

    def sample() -> float:
        begin = time.perf_counter()
        # A function that JAX has not seen before: it keeps what it compiled.
        jax.jit(lambda *arrays: step(*arrays), donate_argnums=(1, 2)).lower(
            params, state, params
        ).compile()
        return time.perf_counter() - begin

    samplers: dict[str, Sampler] = {JAX: sample}
    return Row("jax-compile", f"JAX, compiling the step of {model.extent}", samplers)


ROWS: dict[str, Callable[[Any], Row]] = {
    "jax-1": partial(nesterov, leaves=1),
    "jax-200": partial(nesterov, leaves=200),
    "jax-1000": small,
    "jax-nadam": nadam,
    "jax-compile": compile_time,
}
