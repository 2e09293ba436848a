"""Seeding, and the random state of this process for checkpoints."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from internlm.utils.former_names import explain_former_names

explain_former_names(__name__)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices). Initial weights do not depend on it: see `materialize`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The states of all random generators of this process."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the states returned by `random_state`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
