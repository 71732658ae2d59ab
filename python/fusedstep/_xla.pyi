FFI_VERSION: tuple[int, int]  # of the headers that the handlers were compiled against
TARGETS: list[tuple[str, str, object]]  # (platform, name, capsule)
MAX_HYPERS: int  # hyper-parameters of a rule, at most
NUM_SETTLED: int  # numbers before the norms in what `fusedstep.settle` returns
