"""How long OpenMP's threads look for one another in a loop before they sleep.

PyTorch's operators share their work over threads that meet thousands of times a second. By its default GNU's OpenMP
looks for milliseconds. Beside other programs a thread so uses up its share of a core while the one it waits for has
none. With few turns it sleeps too soon, and a quiet machine pays for waking it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

_TURNS = "GOMP_SPINCOUNT"
_OWN_CHOICE = "3000"
"""The fewest turns that cost a quiet machine no more than 3 % (benchmarks/LOG.md)."""


def set_spin_count(environment: MutableMapping[str, str] = os.environ) -> None:
    """Choose the turns for this process, unless its environment does; without effect once torch is imported."""
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in environment:
        environment.setdefault(_TURNS, _OWN_CHOICE)


def waiting_of_threads(environment: MutableMapping[str, str] = os.environ) -> str:
    """In words, for the log."""
    told = [f"{name} = {environment[name]}" for name in ("OMP_WAIT_POLICY", _TURNS) if name in environment]
    return f"threads wait by {', '.join(told)}" if told else "threads wait as OpenMP does by default"
