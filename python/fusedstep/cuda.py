"""What there is of CUDA: in this build, and on this machine."""

from __future__ import annotations

import importlib
from typing import NamedTuple

# As _core says it of an array on a GPU.
_NOT_BUILT = (
    "this build of fusedstep has no CUDA backend; install one that has, or build it where nvcc is "
    "(FUSEDSTEP_CUDA=ON)"
)


class CudaStatus(NamedTuple):
    """What `cuda_status` found.

    Attributes:
        built: whether this build of fusedstep has kernels for GPUs.
        architectures: what they were compiled for, by the names of NVIDIA's tools: `sm_90` is code
            for compute capability 9.0 (and later 9.x), `compute_90` is PTX, of which the driver
            makes code for any later GPU. () if not built.
        runtime: version of the CUDA runtime inside fusedstep, such as "13.0"; None if not built.
        driver: the newest version of CUDA that the installed driver supports; None if there is no
            driver, or if not built.
        devices: number of GPUs that can be computed on.
        names: the name of each, with its compute capability.
        why: None if there is at least one, else what is missing.
    """

    built: bool
    architectures: tuple[str, ...]
    runtime: str | None
    driver: str | None
    devices: int
    names: tuple[str, ...]
    why: str | None


def cuda_status() -> CudaStatus:
    """Tells whether arrays on a GPU can be used, and if not, why.

    Everything works without a GPU but steps on arrays that lie on one. The first call wakes the
    driver, which can take a second where there are many GPUs, and processes that are forked later
    cannot use CUDA; no memory of a GPU is taken.

    Returns:
        A `CudaStatus`, a named tuple. `why is None` means that GPUs can be used.

    Example:
        >>> status = cuda_status()
        >>> status.built or status.why.startswith("this build of fusedstep has no CUDA")
        True
        >>> (status.devices > 0) == (status.why is None)
        True
    """
    try:
        _cuda = importlib.import_module("fusedstep._cuda")
    except ModuleNotFoundError:
        return CudaStatus(False, (), None, None, 0, (), _NOT_BUILT)
    except ImportError as error:
        why = f"fusedstep._cuda cannot be loaded: {error}"
        return CudaStatus(True, (), None, None, 0, (), why)
    info = _cuda.info()
    return CudaStatus(
        built=True,
        architectures=tuple(info["architectures"].split()),
        runtime=_version(info["runtime"]),
        driver=_version(info["driver"]),
        devices=len(info["devices"]),
        names=tuple(f"{name} ({major}.{minor})" for name, major, minor in info["devices"]),
        why=info["why"],
    )


def _version(number: int) -> str | None:
    return f"{number // 1000}.{number % 1000 // 10}" if number else None
