"""Registers the handlers of `fusedstep._xla` with XLA, after everything has been checked.

XLA keeps what it is given until its CPU backend starts, and a handler that it refuses then takes
the whole backend down. So whatever could be refused is found out before, and raises ImportError.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

OLDEST_JAX = (0, 7, 2)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _import_jax() -> Any:
    try:
        import jax
    except ImportError as error:
        raise ImportError(
            f"fusedstep.jax needs JAX, pip install 'fusedstep[jax]' brings it: {error}"
        ) from error
    if _numbers(jax.__version__) < OLDEST_JAX:
        oldest = ".".join(map(str, OLDEST_JAX))
        raise ImportError(f"fusedstep.jax needs jax >= {oldest}, got {jax.__version__}")
    return jax


def _import_handlers() -> ModuleType:
    try:
        from fusedstep import _xla
    except ImportError as error:
        raise ImportError(
            "fusedstep.jax needs the compiled module fusedstep._xla. If this build of fusedstep "
            "has none, build it again where the headers of jaxlib 0.7.2 can be installed "
            f"(FUSEDSTEP_XLA=ON says why not). The cause: {error}"
        ) from error
    return _xla


def _runtime_version(jax: Any) -> tuple[int, int] | None:
    """The version of XLA's FFI that this jaxlib says it has; None if it does not."""
    try:
        header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    except (OSError, RuntimeError):
        return None
    found = [re.search(rf"#define XLA_FFI_API_{part} (\d+)", header) for part in ("MAJOR", "MINOR")]
    major, minor = (int(match[1]) if match else -1 for match in found)
    return (major, minor) if minor >= 0 else None


def _check_version(jax: Any, handlers: ModuleType) -> None:
    ours, theirs = handlers.FFI_VERSION, _runtime_version(jax)
    if theirs is not None and (ours[0] != theirs[0] or ours > theirs):
        raise ImportError(_refusal(jax, handlers, f"it has version {theirs[0]}.{theirs[1]}"))


def _refusal(jax: Any, handlers: ModuleType, why: object) -> str:
    major, minor = handlers.FFI_VERSION
    return (
        f"fusedstep.jax: its handlers are of version {major}.{minor} of XLA's FFI, which jaxlib "
        f"{jax.lib.__version__} does not run: {why}. Use another jaxlib, or a newer fusedstep."
    )


def _try(jax: Any, handlers: ModuleType) -> None:
    """Hands one handler to XLA at once, which judges it; nothing is kept if it is refused.

    There is no public way to ask. Where the private one is missing, the versions have to do.
    """
    try:
        from jaxlib import xla_client

        register = xla_client._xla.register_custom_call_target
        platform = xla_client.xla_platform_names["cpu"]
        traits = xla_client.CustomCallTargetTraits.DEFAULT
    except (ImportError, AttributeError, KeyError):
        return
    _, name, capsule = next(target for target in handlers.TARGETS if target[0] == "cpu")
    try:
        register(name, capsule, platform, 1, traits)
    except TypeError:
        return  # another signature
    except Exception as error:
        raise ImportError(_refusal(jax, handlers, error)) from error


def register() -> None:
    """Registers all handlers, once; raises ImportError before it has registered any."""
    jax = _import_jax()
    handlers = _import_handlers()
    _check_version(jax, handlers)
    _try(jax, handlers)
    for platform, name, capsule in handlers.TARGETS:
        jax.ffi.register_ffi_target(name, capsule, platform=platform)
