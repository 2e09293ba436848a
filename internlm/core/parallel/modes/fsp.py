"""fsp: msp that saves only this rank's shard of a column layer's input for backward.

Backward gathers the input again, overlapped with the GEMM of its gradient. One more all-gather per column layer reduces
the memory of saved inputs by the tensor degree n.
"""

from __future__ import annotations

from typing import ClassVar

from internlm.core.parallel.modes.msp import Msp


class Fsp(Msp):
    """The mode fsp; see the module docstring."""

    saves_gathered_input: ClassVar[bool] = False
