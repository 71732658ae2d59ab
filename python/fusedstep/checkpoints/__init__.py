"""The state of an optimizer as a dict and as a file. What is loaded is checked first, all of it.

`state` has the dict, `transfer` takes over state from elsewhere, `files` knows what stands in a
file, `npz` and `tensors` how its arrays lie there, `placing` how it gets to its place.
"""

from __future__ import annotations

from fusedstep.checkpoints.files import load, save
from fusedstep.checkpoints.state import capture, restore
from fusedstep.checkpoints.transfer import assign

__all__ = ["assign", "capture", "load", "restore", "save"]
