"""A LLaVA model computes what transformers' LlavaForConditionalGeneration computes, with the same weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.llava import CLIP, SIGLIP, llava_config, with_pictures
from helpers.tiny import VOCAB, micro_batch, tiny_config
from torch import Tensor
from torch.nn import functional as F

from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.parallelize import parallelize
from internlm.data.batch import IGNORE_INDEX, MicroBatch
from internlm.data.packing import image_placeholders
from internlm.model.decoder import Decoder
from internlm.model.huggingface.to_config import hf_config
from internlm.model.huggingface.weight_names import to_hf
from internlm.model.llava.model import IMAGE_FEATURES, Llava
from internlm.model.llava.projector import make_projector
from internlm.model.llava.vision_tower import VisionTower, folder_config
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.model.registry import build_model
from internlm.utils.errors import ConfigError, DataError

TOWERS = [(CLIP, "patch"), (CLIP, "cls_patch"), (SIGLIP, "patch")]


def make(tower: dict[str, Any] = CLIP, select: str = "patch", seed: int = 3, **keys: Any) -> Llava:
    with torch.device("meta"):
        model = build_model("LLAVA", llava_config(tower, select, **keys))
    parallelize(model, ParallelContext.create(), seed=seed)
    assert isinstance(model, Llava)
    return model


def oracle(model: Llava, select: str) -> torch.nn.Module:
    """transformers' model with the weights of ours; its vision tower is wholly trained, as it is in ours here."""
    import transformers

    text = hf_config(model.architecture, "LLAMA2")
    config = transformers.LlavaConfig(
        vision_config=model.vision.config,
        text_config=text,
        image_token_index=VOCAB + 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if select == "patch" and model.vision._first else "full",
    )
    theirs = transformers.LlavaForConditionalGeneration(config)
    missing, unexpected = theirs.load_state_dict(their_names(model, dict(model.named_parameters())), strict=False)
    assert not unexpected and all(name.endswith("position_ids") for name in missing)
    return theirs


def their_names(model: Llava, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found, ours = {}, {}
    for name, tensor in tensors.items():
        if name.startswith("vision_tower."):
            found[f"model.{name}"] = tensor
        elif name.startswith("vision_proj."):
            found[name.replace("vision_proj", "model.multi_modal_projector")] = tensor
        else:
            ours[name] = tensor
    for name, tensor in to_hf(ours, model.architecture).items():
        found[name.replace("model.", "model.language_model.", 1)] = tensor
    return {name: tensor.detach() for name, tensor in found.items()}


def packed(n: int, tokens: int) -> MicroBatch:
    starts = ((0, 9), (), (12,), (2, 8, 13))[n] if tokens == 4 else ((0, 9), (), (11,), (1, 8, 14))[n]
    return with_pictures(micro_batch(n, masked=0.1), n, starts, tokens)


def our_loss(model: Llava, micro: MicroBatch) -> tuple[Tensor, Tensor]:
    varlen = VarlenMetadata.of(micro.lengths or ())
    hidden = model(micro.input_ids, micro.position_ids, varlen, images=micro.images, extra=micro.extra)
    logits = model.logits(hidden)
    return logits, F.cross_entropy(logits[0], micro.labels[0], ignore_index=IGNORE_INDEX, reduction="sum")


def their_logits(theirs: torch.nn.Module, micro: MicroBatch, tokens: int) -> Tensor:
    """Each document by itself, with its pictures."""
    ids = micro.input_ids.masked_fill(micro.extra[IMAGE_FEATURES] >= 0, VOCAB + 2)
    indices, images = micro.extra[IMAGE_FEATURES], micro.images
    start, found = 0, []
    for length in micro.lengths or ():
        part = indices[0, start : start + length]
        own = sorted({int(index) // tokens for index in part[part >= 0]})
        pictures = {"pixel_values": images[own]} if own and images is not None else {}
        found.append(theirs(input_ids=ids[:, start : start + length], **pictures).logits)
        start += length
    return torch.cat(found, dim=1)


@pytest.mark.parametrize(("tower", "select"), TOWERS)
def test_logits_and_gradients_are_those_of_transformers(tower: dict[str, Any], select: str) -> None:
    model = make(tower, select, vocab_size=VOCAB + 3)
    theirs = oracle(model, select)
    tokens = model.vision.tokens_per_image
    assert tokens == (5 if select == "cls_patch" else 4)
    for n in range(4):
        micro = packed(n, tokens)
        logits, loss = our_loss(model, micro)
        expected = their_logits(theirs, micro, tokens)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        loss.backward()
        F.cross_entropy(expected[0], micro.labels[0], ignore_index=IGNORE_INDEX, reduction="sum").backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = their_names(model, gradients)
    expected_gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    # transformers computes the layer behind the selected one too, but nothing depends on it.
    assert found.keys() == expected_gradients.keys()
    assert any("vision_tower.embeddings" in name for name in found)
    largest = max(float(gradient.abs().max()) for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        # The bias of keys has a gradient of 0, of which only rounding is seen.
        scale = largest if name.endswith("k_proj.bias") else float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5 * scale, msg=name)


def test_rows_without_pictures_are_those_of_the_decoder() -> None:
    model, micro = make(), micro_batch(1)
    hidden = Decoder.forward(model, micro.input_ids, micro.position_ids, VarlenMetadata.of(micro.lengths or ()))
    logits, loss = our_loss(model, micro)
    assert torch.equal(logits, model.logits(hidden))
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert not name.startswith("vision") or not parameter.grad.any()


@pytest.mark.parametrize("policy", ["nothing", "attention", "matmuls"])
@pytest.mark.parametrize("tower", [CLIP, SIGLIP])
def test_a_recomputed_tower_saves_less_and_has_the_same_gradients(tower: dict[str, Any], policy: str) -> None:
    model, micro, found = make(tower), packed(3, 4), []
    for policies in (("everything",) * 2, (policy,) * 2):
        model.vision.save_policies = policies
        model.zero_grad()
        saved: list[int] = []

        def count(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            features = model.encode(micro.images)
        features.square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((features, gradients, sum(saved)))
    assert torch.equal(found[0][0], found[1][0]) and found[1][2] < found[0][2] / 2
    assert found[0][1].keys() == found[1][1].keys()
    assert all(torch.equal(gradient, found[1][1][name]) for name, gradient in found[0][1].items())


def test_as_many_layers_of_the_tower_are_recomputed_as_of_the_decoder() -> None:
    policies = [make(checkpoint=share).vision.save_policies for share in (0.0, 0.5, 1.0)]
    assert policies == [("everything",) * 2, ("nothing", "everything"), ("nothing",) * 2]


def test_what_no_feature_depends_on_is_not_trained() -> None:
    fixed = {name for name, parameter in make(SIGLIP).named_parameters() if not parameter.requires_grad}
    modules = {"encoder.layers.2", "post_layernorm", "head"}
    assert fixed == {name for name in fixed if any(name.startswith(f"vision_tower.{m}.") for m in modules)}
    assert len(fixed) == 16 + 2 + 11


def test_the_gradient_of_features_is_scaled_with_that_of_embeddings() -> None:
    gradients = []
    for factor in (1.0, 0.25):
        model = make(embed_grad_scale=factor)
        our_loss(model, packed(0, 4))[1].backward()
        gradients.append(
            [p.grad for p in (model.tok_embeddings.weight, model.vision_proj[0].weight, model.norm.weight)]
        )
    for number, factor in enumerate((0.25, 0.25, 1.0)):
        torch.testing.assert_close(gradients[1][number], factor * gradients[0][number])


@pytest.mark.parametrize(("kind", "depth"), [("linear", 1), ("mlp2x_gelu", 2), ("mlp3x_gelu", 3), ("identity", 0)])
def test_projectors_have_their_linear_layers(kind: str, depth: int) -> None:
    projector = make_projector(kind, 20, 20, torch.float32)
    assert [name for name, _ in projector.named_parameters()] == [
        f"linear_{number}.{part}" for number in range(1, depth + 1) for part in ("weight", "bias")
    ]
    assert projector(torch.zeros(2, 5, 20)).shape == (2, 5, 20)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"vit_cfg": {"config": {**CLIP, "model_type": "vit"}}},
            "model_type 'vit' is not supported; supported: ",
        ),
        ({"vit_cfg": {"mm_vision_tower": "/no/folder"}}, "there is no folder '/no/folder'"),
        ({"vit_cfg": {"config": CLIP, "mm_vision_select_layer": -5}}, "= -5: the vision tower has 3 layers"),
        ({"vit_cfg": {"config": SIGLIP, "mm_vision_select_feature": "cls_patch"}}, "SigLIP tower has no class token"),
        (
            {"vision_proj_cfg": {"mm_projector_type": "identity"}},
            "the vision tower has width 20, the language",
        ),
        ({"vision_proj_cfg": {"mm_hidden_size": 24}}, "mm_hidden_size = 24, but the vision tower has width 20"),
    ],
)
def test_mistakes_in_the_config_are_named(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        llava = {"image_token_id": 3, "vit_cfg": {"config": CLIP}, "vision_proj_cfg": {}, **keys}
        build_model("LLAVA", tiny_config(**llava))


def test_pictures_of_another_size_are_named() -> None:
    with pytest.raises(DataError, match="pictures have 4 x 4 pixels, but the vision tower takes 8 x 8"):
        make().encode(torch.zeros(1, 3, 4, 4))


def test_data_and_model_agree_on_the_name_of_indices() -> None:
    assert image_placeholders.IMAGE_FEATURES == IMAGE_FEATURES


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([CLIP], "must be a JSON object"),
        ({**CLIP, "hidden_act": "swiggle"}, "CLIPVisionModel of transformers cannot be built"),
    ],
)
def test_a_tower_that_cannot_be_built_is_named(tmp_path: Path, values: object, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    section = llava_config().vit_cfg.model_copy(update={"config": None, "mm_vision_tower": str(tmp_path)})  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=message), torch.device("meta"):
        VisionTower(folder_config(tmp_path), section).build(torch.float32)
