"""FLOPs of a picture against torch's own counter, and bytes saved for backward against those that autograd saves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.llava import CLIP, SIGLIP, llava_config
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.parallelize import parallelize
from internlm.estimate.vision import VisionDimensions
from internlm.initialize.vision_costs import describe_vision, vision_dimensions
from internlm.model.llava.model import Llava
from internlm.model.registry import build_model
from internlm.solver.optimizer.parameter_groups import ParameterGroup, freeze_parameters

FROZEN_TOWER = [ParameterGroup("vision_tower.*", freeze=True)]
FROZEN = [*FROZEN_TOWER, ParameterGroup("vision_proj.*", freeze=True)]
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "image_size": 32}
TOWERS = [({**tower, **SIZES}, select) for tower, select in ((CLIP, "patch"), (CLIP, "cls_patch"), (SIGLIP, "patch"))]
NUM_PICTURES = 2


def make(tower: dict[str, Any], select: str, groups: list[ParameterGroup]) -> tuple[Llava, VisionDimensions]:
    with torch.device("meta"):
        model = build_model("LLAVA", llava_config(tower, select))
    parallelize(model, ParallelContext.create())
    assert isinstance(model, Llava)
    freeze_parameters([model], groups)
    return model, vision_dimensions(model, groups)


@pytest.mark.parametrize(("tower", "select"), TOWERS)
def test_flops_of_a_forward_pass_are_those_that_torch_counts(tower: dict[str, Any], select: str) -> None:
    model, vision = make(tower, select, FROZEN)
    # The counter does not know the fused kernel of CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model.encode(torch.randn(NUM_PICTURES, 3, 32, 32))
    assert counter.get_total_flops() == NUM_PICTURES * (vision.tower_flops + vision.projector_flops)


@pytest.mark.parametrize("groups", [[], FROZEN_TOWER, FROZEN], ids=["trained", "frozen_tower", "frozen"])
@pytest.mark.parametrize(("tower", "select"), TOWERS)
def test_saved_bytes_are_those_of_autograd(tower: dict[str, Any], select: str, groups: list[ParameterGroup]) -> None:
    model, vision = make(tower, select, groups)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.encode(torch.randn(NUM_PICTURES, 3, 32, 32))
    # A view of the last hidden state saves all of it.
    num_bytes = sum(tensor.nbytes for tensor in saved.values())
    assert num_bytes == NUM_PICTURES * vision.saved_bytes


def test_a_trained_part_counts_thrice() -> None:
    flops = []
    for groups in ([], FROZEN_TOWER, FROZEN):
        _, vision = make(*TOWERS[0], groups)
        flops.append((vision.tower_flops, vision.projector_flops))
    (trained_tower, trained), (tower, projector), (same, frozen) = flops
    assert trained_tower == 3 * tower == 3 * same and trained == projector == 3 * frozen


def test_the_line_names_what_is_left_out() -> None:
    model, _ = make(*TOWERS[0], FROZEN_TOWER)
    line = describe_vision(model, FROZEN_TOWER, 32)
    assert "(frozen: a forward pass alone)" in line and "leave pictures out" in line
