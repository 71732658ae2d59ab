"""The examples of braintools' pages on MomentumNesterov and Momentum, run with another import line.

The text of the first page has lost its line breaks, and is kept like that.
"""

from __future__ import annotations

import re
from typing import Any

import brainstates as bs
import numpy as np
import pytest

pytestmark = pytest.mark.framework("braintools")

IMPORTS = ">>> import brainstate >>> import braintools >>> import jax.numpy as jnp >>>"
REGISTER = ">>> optimizer.register_trainable_weights(model.states(brainstate.ParamState))"
FIRST_PAGE = {
    "basic": f"{IMPORTS} >>> # Create model >>> model = brainstate.nn.Linear(10, 5) "
    ">>> optimizer = braintools.optim.MomentumNesterov(lr=0.01, momentum=0.9) " + REGISTER,
    "weight decay": ">>> optimizer = braintools.optim.MomentumNesterov("
    "lr=0.01, momentum=0.9, weight_decay=0.0001) " + REGISTER,
    "gradient clipping": ">>> optimizer = braintools.optim.MomentumNesterov( ... lr=0.01, "
    "... momentum=0.9, ... grad_clip_norm=1.0 ... ) " + REGISTER,
    "learning rate scheduling": ">>> scheduler = braintools.optim.ExponentialLR("
    "base_lr=0.01, gamma=0.95) >>> optimizer = braintools.optim.MomentumNesterov("
    f"lr=scheduler, momentum=0.9) {REGISTER} >>> >>> for epoch in range(100): "
    "... # Training code here ... optimizer.step(grads) ... scheduler.step()",
}
SECOND_PAGE = {
    "basic": """\
>>> import brainstate
>>> import braintools
>>> import jax.numpy as jnp
>>>
>>> # Create model
>>> model = brainstate.nn.Linear(10, 5)
>>> optimizer = braintools.optim.Momentum(lr=0.01, momentum=0.9)
>>> optimizer.register_trainable_weights(model.states(brainstate.ParamState))
""",
    "weight decay": """\
>>> optimizer = braintools.optim.Momentum(lr=0.01, momentum=0.9, weight_decay=0.0001)
>>> optimizer.register_trainable_weights(model.states(brainstate.ParamState))
""",
    "learning rate scheduling": """\
>>> scheduler = braintools.optim.StepLR(base_lr=0.1, step_size=30, gamma=0.1)
>>> optimizer = braintools.optim.Momentum(lr=scheduler, momentum=0.9)
>>> optimizer.register_trainable_weights(model.states(brainstate.ParamState))
>>>
>>> for epoch in range(100):
...     # Training code here
...     optimizer.step(grads)
...     if (epoch + 1) % epoch_size == 0:
...         scheduler.step()
""",
}
EXAMPLES = [
    *((f"first page, {title}", text) for title, text in FIRST_PAGE.items()),
    *((f"second page, {title}", text) for title, text in SECOND_PAGE.items()),
]


def code_of(text: str) -> str:
    """The program of an example; on one line, what follows a `for` is its body."""
    if "\n" in text:
        return "".join(f"{line[4:]}\n" for line in text.splitlines())
    lines: list[str] = []
    loop = False
    for prompt, line in re.findall(r"(>>>|\.\.\.) ?(.*?) ?(?=>>>|\.\.\.|$)", text):
        loop = line.startswith("for ") or (loop and prompt == "...")
        lines.append(f"    {line}" if loop and prompt == "..." else line)
    return "\n".join(lines)


def imported(code: str, line: str) -> str:
    """The example with another import line (a later one of a page goes on from the first)."""
    start = code if "import braintools" in code else f"import braintools\n{code}"
    return start.replace("import braintools", line)


@pytest.mark.parametrize("text", [text for _, text in EXAMPLES], ids=[name for name, _ in EXAMPLES])
def test_examples(text: str) -> None:
    """They end with the weights and buffers that they end with in braintools."""
    weights = {}
    for line in ("from fusedstep import braintools", "import braintools"):
        bs.brainstate.random.seed(0)
        model = bs.brainstate.nn.Linear(10, 5)
        states = model.states(bs.brainstate.ParamState)
        grads = {
            key: bs.jax.tree.map(lambda x: 0.1 * x + 0.03, s.value) for key, s in states.items()
        }
        given: dict[str, Any] = {
            "brainstate": bs.brainstate, "model": model, "grads": grads, "epoch_size": 30,
        }  # fmt: skip
        bs.brainstate.random.seed(0)  # the first examples make the model themselves: the same
        exec(compile(imported(code_of(text), line), "example", "exec"), given)
        optimizer = given["optimizer"]
        for _ in range(3):
            optimizer.step(grads)
        (weights[line],) = (s.value for s in given["model"].states().values() if s.value)
        module = "fusedstep.braintools" if "fusedstep" in line else "braintools"
        assert type(optimizer).__module__.startswith(module)
    mine, theirs = weights.values()
    for key in ("weight", "bias"):
        np.testing.assert_allclose(mine[key], theirs[key], rtol=2e-6, atol=1e-7)
        assert float(np.abs(mine[key] - np.float32(0)).max()) > 0


def test_the_lost_line_breaks() -> None:
    code = code_of(FIRST_PAGE["learning rate scheduling"])
    assert "\n    optimizer.step(grads)\n    scheduler.step()" in code
    assert code_of(FIRST_PAGE["gradient clipping"]).count("\n") == 5


def test_the_module_under_the_name_optim() -> None:
    """As the issue has it: `import fusedstep.braintools as optim`."""
    import fusedstep.braintools as optim

    weight = bs.brainstate.ParamState(bs.jax.numpy.ones(2))
    optimizer = optim.MomentumNesterov(lr=0.5, momentum=0.5)
    assert optimizer.register_trainable_weights({"w": weight}) is optimizer
    assert optimizer.update({"w": bs.jax.numpy.array([1.0, -0.5])}) is None
    assert weight.value.tolist() == [0.25, 1.375]
