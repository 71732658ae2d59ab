"""Importing `fusedstep.jax`: what is refused, that JAX survives it, and what is registered."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from jaxruns import fj, jax
from subprocesses import run_python

pytestmark = pytest.mark.framework("jax")

# After a refusal: nothing is registered, and JAX has its CPU backend.
_REFUSED = """
import sys
{prepare}
try:
    import fusedstep.jax
except ImportError as error:
    print(error)
else:
    raise SystemExit("was imported")
from jaxlib import xla_client
assert not [name for names in xla_client._custom_callback.values() for name, *_ in names
            if "fusedstep" in str(name)]
import jax, jax.numpy as jnp
assert float(jax.jit(lambda x: x.sum())(jnp.ones(3))) == 3
"""


def refusal(prepare: str) -> str:
    return run_python(_REFUSED.format(prepare=prepare))


def test_a_build_without_the_module() -> None:
    text = refusal("sys.modules['fusedstep._xla'] = None")
    assert "needs the compiled module fusedstep._xla" in text
    assert "jaxlib 0.7.2" in text


def test_an_old_jax() -> None:
    text = refusal("import jax; jax.__version__ = '0.6.2'")
    assert text == "fusedstep.jax needs jax >= 0.7.2, got 0.6.2\n"


def test_no_jax() -> None:
    program = """
        import sys
        sys.modules["jax"] = None
        try:
            import fusedstep.jax
        except ImportError as error:
            print(error)
    """
    assert "fusedstep.jax needs JAX, pip install 'fusedstep[jax]' brings it" in run_python(program)


def test_handlers_of_a_newer_version_than_that_of_the_runtime() -> None:
    text = refusal("from fusedstep import _xla; _xla.FFI_VERSION = (0, 99)")
    assert "its handlers are of version 0.99 of XLA's FFI, which jaxlib" in text
    assert "does not run: it has version 0." in text


_HANDLER = """
#include "xla/ffi/api/c_api.h"
XLA_FFI_Error* handler(XLA_FFI_CallFrame* frame) {
  XLA_FFI_Metadata_Extension* asked = (XLA_FFI_Metadata_Extension*)frame->extension_start;
  asked->metadata->api_version.major_version = 0;
  asked->metadata->api_version.minor_version = 99;
  return 0;
}
"""
_LIE = """
import ctypes, types, jax
handler = ctypes.CDLL({library!r}).handler
lie = types.ModuleType("fusedstep._xla")
lie.FFI_VERSION, lie.MAX_HYPERS, lie.NUM_SETTLED = (0, 1), 16, 23
lie.TARGETS = [("cpu", "fusedstep.norms", jax.ffi.pycapsule(handler))]
import fusedstep
sys.modules["fusedstep._xla"] = fusedstep._xla = lie
"""


@pytest.fixture(scope="module")
def newer_handler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with a handler that says to be of version 0.99."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("handler")
    source, library = folder / "handler.c", folder / "handler.so"
    source.write_text(_HANDLER)
    flags = ["-shared", "-fPIC", f"-I{jax.ffi.include_dir()}"]
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    return library


def test_handlers_that_xla_refuses(newer_handler: Path) -> None:
    """XLA's own judgement, where the versions say nothing: it is asked before JAX is told."""
    text = refusal(_LIE.format(library=str(newer_handler)))
    assert "which jaxlib" in text
    assert "does not run: " in text
    assert "0.99" in text


def test_registering_them_after_all_would_cost_the_backend(newer_handler: Path) -> None:
    """What the check is for."""
    program = f"""
        import ctypes, jax
        handler = ctypes.CDLL({str(newer_handler)!r}).handler
        jax.ffi.register_ffi_target("other", jax.ffi.pycapsule(handler), platform="cpu")
        jax.numpy.ones(3)
    """
    assert "0.99" in run_python(program, fails=True)


@pytest.mark.parametrize(
    ("first_words", "reason"),
    [([99, 0], "another version"), ([1, 8], "types of other sizes")],
)
def test_a_core_of_another_build(first_words: list[int], reason: str) -> None:
    prepare = f"""
import ctypes, fusedstep._core as core
table = (ctypes.c_uint32 * 64)(*{first_words})
make = ctypes.pythonapi.PyCapsule_New
make.restype, make.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
core._C_API = make(ctypes.addressof(table), b"fusedstep._core._C_API", None)
"""
    text = refusal(prepare)
    assert f"fusedstep._xla and fusedstep._core are of different builds ({reason}" in text


def test_fusedstep_alone_imports_no_jax_and_registers_nothing() -> None:
    program = """
        import sys, fusedstep
        assert not [name for name in sys.modules if name.split(".")[0] in ("jax", "jaxlib")]
        assert "fusedstep._xla" not in sys.modules
    """
    run_python(program)


def test_importing_it_starts_no_backend() -> None:
    """`jax.distributed.initialize` and flags come before that."""
    program = """
        import jax, fusedstep.jax
        from jax._src import xla_bridge
        assert not xla_bridge.backends_are_initialized()
        jax.config.update("jax_num_cpu_devices", 3)
        assert len(jax.devices("cpu")) == 3
        tx = fusedstep.jax.sgd(lr=0.5)
        p = jax.numpy.ones(3)
        assert tx.step(p, tx.init(p), p)[0].tolist() == [0.5] * 3
    """
    run_python(program, XLA_FLAGS="")


def test_importing_it_late_or_twice_is_fine() -> None:
    program = """
        import importlib, jax
        jax.numpy.ones(3)  # the backend runs
        import fusedstep.jax
        from fusedstep.jax import runtime
        runtime.register()
        tx = fusedstep.jax.sgd(lr=0.5)
        p = jax.numpy.ones(3)
        assert tx.step(p, tx.init(p), p)[0].tolist() == [0.5] * 3
    """
    run_python(program)


def test_versions_are_read_as_jax_writes_them() -> None:
    from fusedstep.jax import runtime

    assert runtime._numbers("0.10.2") > runtime.OLDEST_JAX
    assert runtime._numbers("0.7.2.dev20260101+abc") == (0, 7, 2)
    assert runtime._numbers("0.12.0.1") == (0, 12, 0)
    nowhere = SimpleNamespace(ffi=SimpleNamespace(include_dir=lambda: "/nonexistent"))
    assert runtime._runtime_version(nowhere) is None
    known = runtime._runtime_version(jax)
    assert known is not None
    assert known >= (0, 1)


def test_handlers_are_compiled_against_the_oldest_headers() -> None:
    from fusedstep import _xla

    assert _xla.FFI_VERSION == (0, 1)
    assert {platform for platform, _, _ in _xla.TARGETS} == {"cpu"}
    assert fj is not None
