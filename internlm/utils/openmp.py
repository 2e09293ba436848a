"""How long OpenMP threads spin at a barrier before they sleep.

The threads of PyTorch's operators meet at barriers thousands of times a second. By default, GNU OpenMP spins for
milliseconds: on a busy machine, a thread then occupies a core while the thread it waits for has none. With too few
spins, threads sleep too early, and an idle machine pays for the wake-up.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

_SPIN_COUNT = "GOMP_SPINCOUNT"
_DEFAULT = "3000"
"""The smallest count that costs an idle machine no more than 3 % (benchmarks/LOG.md)."""


def set_spin_count(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the spin count of this process unless its environment does; has no effect once torch is imported."""
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in environment:
        environment.setdefault(_SPIN_COUNT, _DEFAULT)


def waiting_of_threads(environment: MutableMapping[str, str] = os.environ) -> str:
    """Describe the wait policy, for the log."""
    settings = [f"{name} = {environment[name]}" for name in ("OMP_WAIT_POLICY", _SPIN_COUNT) if name in environment]
    return f"OpenMP threads wait by {', '.join(settings) or 'default'}"
