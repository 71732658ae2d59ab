from typing import TypedDict

class _Info(TypedDict):
    architectures: str  # that the kernels were compiled for, separated by spaces
    runtime: int  # 1000 * major + 10 * minor
    driver: int  # the same of the CUDA that the driver supports; 0 if there is none
    devices: list[tuple[str, int, int]]  # (name, compute capability major, minor)
    why: str | None  # nothing can be computed

_DEVICE_API: object  # a capsule: the function table that _core looks up (core/device.hpp)

def info() -> _Info: ...
def set_walk(
    walk: str, /
) -> str: ...  # 'forward' or 'backward': the order in memory; the one before
