"""What every rank would import on its way, imported once: processes that are forked after it start at once."""

from __future__ import annotations

import torch

import internlm.verify.run  # noqa: F401

with torch.device("meta"):
    torch.nn.Embedding(1, 1)  # PyTorch imports a lot for the first random tensor without storage
