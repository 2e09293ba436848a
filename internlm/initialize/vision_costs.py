"""What pictures cost in a run: the dimensions of its vision tower and projector, and the line that reports them."""

from __future__ import annotations

from collections.abc import Sequence

from internlm.estimate.dimensions import ModelDimensions
from internlm.estimate.flops import flops_per_token
from internlm.estimate.vision import VisionDimensions
from internlm.model.llava.model import Llava
from internlm.model.llava.projector import num_linear_layers
from internlm.solver.optimizer.parameter_groups import ParameterGroup, is_frozen


def vision_dimensions(model: Llava, groups: Sequence[ParameterGroup]) -> VisionDimensions:
    """The dimensions of tower and projector, and which of them a backward pass runs through.

    Args:
        model: or a pipeline stage of it.
        groups: of the optimizer, with those that are implied.
    """
    config, vision = model.vision.config, model.vision
    trained = [
        name for name, weight in model.vision_weights().items() if weight.requires_grad and not is_frozen(name, groups)
    ]
    trains_tower = any(name.startswith("vision_tower.") for name in trained)
    num_patches = (config.image_size // config.patch_size) ** 2
    return VisionDimensions(
        num_layers=vision.num_layers,
        width=vision.width,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_tokens=num_patches + vision.has_class_token,
        num_patches=num_patches,
        patch_values=3 * config.patch_size**2,
        num_features=vision.tokens_per_image,
        has_norm_before_layers=config.model_type == "clip_vision_model",
        # quick_gelu is x * sigmoid(1.702 x), two operators.
        num_saved_by_activation=3 if config.hidden_act == "quick_gelu" else 2,
        hidden_size=model.architecture.hidden_size,
        num_projector_layers=num_linear_layers(model.projector_type),
        itemsize=model.architecture.dtype.itemsize,
        trains_tower=trains_tower,
        trains_projector=bool(trained),
    )


def describe_vision(model: Llava, groups: Sequence[ParameterGroup], seq_len: int) -> str:
    """One line on the cost of a picture, and on what other figures leave out.

    Args:
        model, groups: see `vision_dimensions`.
        seq_len: tokens of a sequence, for the cost of a token in the decoder.
    """
    vision = vision_dimensions(model, groups)
    token = flops_per_token(ModelDimensions.of(model.architecture), seq_len, "causal")
    frozen = "" if vision.trains_tower else " (frozen: a forward pass alone)"
    tokens = (vision.tower_flops + vision.projector_flops) / token
    return (
        f"a picture: {vision.tower_flops / 1e12:.3g} TFLOP in the vision tower{frozen}, "
        f"{vision.projector_flops / 1e12:.3g} in the projector, together as {tokens:,.1f} tokens in the decoder; "
        f"{vision.saved_bytes / 2**20:,.1f} MiB of activations without recomputation. tflops and mfu count the "
        "pictures of a step; activations of ranks and costs of stages leave pictures out, as their number depends on "
        "the data"
    )
