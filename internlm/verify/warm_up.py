"""Imports everything that ranks import later, so that processes forked from this one start immediately."""

from __future__ import annotations

import torch

import internlm.verify.run  # noqa: F401

with torch.device("meta"):
    torch.nn.Embedding(1, 1)  # the first random tensor on the meta device triggers many imports in PyTorch
