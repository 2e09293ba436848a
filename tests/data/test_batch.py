"""Micro-batches are copied with all that they have."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from helpers.tiny import micro_batch
from torch import Tensor


def test_a_copy_has_every_value_and_shares_no_tensor() -> None:
    micro = micro_batch(0)
    micro.is_padding = torch.zeros_like(micro.labels, dtype=torch.bool)
    micro.extra["weights"] = torch.ones(*micro.input_ids.shape, 2)
    micro.images = torch.ones(2, 3, 4, 4)
    for copy in (micro.copied(Tensor.clone), micro.to("cpu")):
        for field in fields(micro):
            old, new = getattr(micro, field.name), getattr(copy, field.name)
            if isinstance(old, Tensor):
                assert torch.equal(old, new)
            elif field.name != "extra":
                assert old == new
        assert copy.extra.keys() == {"weights"} and torch.equal(copy.extra["weights"], micro.extra["weights"])
    cloned = micro.copied(Tensor.clone)
    for field in fields(micro):
        if isinstance(getattr(micro, field.name), Tensor):
            assert getattr(cloned, field.name) is not getattr(micro, field.name)
    assert cloned.extra["weights"] is not micro.extra["weights"]


def test_pictures_of_another_shape_are_named() -> None:
    with pytest.raises(ValueError, match=r"images is \[2, 4, 4\]: it must be \[pictures, 3, height, width\]"):
        replace(micro_batch(0), images=torch.ones(2, 4, 4))
