"""fsp: msp that keeps only this rank's part of a column layer's input for backward, and gathers it again there, while
the gradient of the input is computed. One more gather a block for n times less memory of these inputs."""

from __future__ import annotations

from typing import ClassVar

from internlm.core.parallel.modes.msp import Msp


class Fsp(Msp):
    """See the module."""

    saves_gathered_input: ClassVar[bool] = False
