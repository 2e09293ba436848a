"""Small copies of models that read pictures keep what meets parallelism, and their batches have pictures."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.layouts import record_of
from helpers.llava import CLIP, SIGLIP
from helpers.ranks import RankPool

from internlm.config.loader import load_config
from internlm.config.rules import find_problems
from internlm.config.schema import Config
from internlm.data.batch import IGNORE_INDEX, MicroBatch
from internlm.data.packing.image_placeholders import IMAGE_FEATURES
from internlm.initialize.stages import build_meta_model
from internlm.model.llava.model import Llava
from internlm.verify.batches import local_batch
from internlm.verify.case import Case, changed
from internlm.verify.choices import BatchChoices, LayoutChoices
from internlm.verify.record import RankRecord, join_ranks
from internlm.verify.report import judge
from internlm.verify.run import run_case
from internlm.verify.shrink import left_out, shrink

STAGE_1 = Path(__file__).parents[2] / "configs" / "7B_llava_stage1.py"


@cache
def stage_1() -> Config:
    return load_config(STAGE_1, ["parallel.zero1.size=-1"], world_size=8).config


def user_config(**keys: object) -> Config:
    """That of stage 1 of LLaVA 7B, with other values for some keys, given with __ for dots."""
    return changed(stage_1(), {name.replace("__", "."): value for name, value in keys.items()})


def small_model(config: Config) -> Llava:
    model = build_meta_model(config)
    assert isinstance(model, Llava)
    return model


@pytest.mark.parametrize(
    ("tower", "select", "feature", "computed", "num_features"),
    [
        ({**CLIP, "num_hidden_layers": 24}, -2, "patch", 2, 4),
        ({**CLIP, "num_hidden_layers": 24}, -1, "cls_patch", 2, 5),
        ({**CLIP, "num_hidden_layers": 24}, 1, "patch", 1, 4),
        ({**SIGLIP, "num_hidden_layers": 27}, 0, "patch", 0, 4),
        ({**SIGLIP, "num_hidden_layers": 1}, -1, "patch", 1, 4),
    ],
)
def test_the_tower_becomes_small_and_is_read_where_it_was(
    tower: dict[str, Any], select: int, feature: str, computed: int, num_features: int
) -> None:
    tower = {**tower, "hidden_size": 1024, "image_size": 336, "patch_size": 14, "layer_norm_eps": 1e-3}
    config = user_config(
        model__vit_cfg={"config": tower, "mm_vision_select_layer": select, "mm_vision_select_feature": feature}
    )
    small = shrink(config)
    vision = small_model(small).vision
    assert not list(find_problems(small, 8))
    assert vision.config.model_type == tower["model_type"] and vision.config.layer_norm_eps == 1e-3
    layers = tower["num_hidden_layers"]
    is_last = select in (-1, layers)
    assert vision.config.num_hidden_layers == max(1, computed + (not is_last))
    assert vision.function["selected layer"] == computed and vision.tokens_per_image == num_features
    assert vision.width <= 64 and vision.config.image_size == small.data.image_size == 8
    assert (small.model.vit_cfg.mm_vision_select_layer < 0) == (select < 0)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["identity", "linear", "mlp3x_gelu"])
def test_the_projector_stays_of_its_kind(kind: str) -> None:
    tower = {"config": {**CLIP, "hidden_size": 4096, "image_size": 336, "patch_size": 14}}
    projector = {"mm_projector_type": kind, "mm_hidden_size": 4096, "hidden_size": 4096}
    small = shrink(user_config(model__vit_cfg=tower, model__vision_proj_cfg=projector, optimizer__groups=[]))
    num_linear = {"identity": 0, "linear": 1, "mlp3x_gelu": 3}[kind]
    assert len(list(small_model(small).vision_proj.parameters())) == 2 * num_linear


def test_a_placeholder_stays_inside_or_outside_of_the_vocabulary() -> None:
    assert shrink(user_config()).model.image_token_id == 200000
    small = shrink(user_config(model__image_token_id=31999)).model
    assert small.image_token_id == small.vocab_size - 1


def test_frozen_groups_stay_and_what_is_not_compared_is_said() -> None:
    config = user_config()
    small = shrink(config)
    assert [group.match for group in small.optimizer.groups] == ["*", "vision_proj.*"]
    assert left_out(config, small) == ["76 of 80 tensors are frozen: weights are compared, and there is no gradient"]
    config = user_config(
        data__is_multimodal=False, model__checkpoint_budget=4.0, optimizer__groups=[{"match": "layers.31.*"}]
    )
    small = shrink(config)
    assert [line.partition(" is left")[0] for line in left_out(config, small)[:2]] == [
        "optimizer.groups: 'layers.31.*'",
        "model.checkpoint_budget",
    ]
    assert left_out(config, small)[2] == "batches without pictures, as data.is_multimodal is not set"


@pytest.mark.parametrize("documents", [BatchChoices(), BatchChoices(packed=False), BatchChoices(ragged=False)])
def test_micro_batches_have_pictures_as_the_loader_places_them(documents: BatchChoices) -> None:
    case = Case(shrink(user_config()), 1, documents)
    micros = [local_batch(case, step, 0, 1).micro_batches[number] for step in range(20) for number in (0, 1)]
    per_document = set()
    for micro in micros:
        indices, labels = micro.extra[IMAGE_FEATURES].flatten(), micro.labels.flatten()
        placeholders = (indices >= 0).nonzero().flatten()
        num_pictures = 0 if micro.images is None else len(micro.images)
        assert indices[placeholders].tolist() == list(range(4 * num_pictures))
        assert micro.images is None or micro.images.shape == (num_pictures, 3, 8, 8)
        assert micro.input_ids.flatten()[placeholders].eq(0).all()
        assert labels[placeholders[placeholders > 0] - 1].eq(IGNORE_INDEX).all()
        assert micro.num_valid_tokens == int((labels != IGNORE_INDEX).sum())
        per_document |= set(_pictures_by_document(micro))
    assert per_document == {0, 1, 2}
    assert [micro.images is None for micro in micros[:5]] == [True, False, True, True, False]


def _pictures_by_document(micro: MicroBatch) -> list[int]:
    """Number of pictures of each document. None is cut."""
    indices = micro.extra[IMAGE_FEATURES].flatten()
    counts = []
    for part in indices.split(list(micro.lengths or (micro.input_ids.shape[1],) * len(micro.input_ids))):
        found = part[part >= 0]
        assert len(found) % 4 == 0 and (len(found) == 0 or int(found[0]) % 4 == 0)
        counts.append(len(found) // 4)
    return counts


def run_with_defect(case: Case, defect: str) -> RankRecord:
    """A run in which rank 1 encodes pictures wrongly."""
    encode = Llava.encode

    def wrong(model: Llava, images: torch.Tensor | None) -> torch.Tensor:
        features = encode(model, images)
        if dist.get_rank() == 0:
            return features
        return 1.001 * features if defect == "scaled" else features.detach() + 0 * features

    Llava.encode = wrong  # type: ignore[method-assign]
    try:
        return run_case(case, 2)
    finally:
        Llava.encode = encode  # type: ignore[method-assign]


@pytest.mark.parametrize("layout", [LayoutChoices(), LayoutChoices(tensor=2)])
@pytest.mark.parametrize("defect", ["none", "scaled", "gradient"])
def test_a_defect_of_one_rank_is_noticed(defect: str, layout: LayoutChoices, ranks: Callable[[int], RankPool]) -> None:
    case = Case(shrink(changed(user_config(), layout.keys())), 2)
    reference = record_of(case.reference(), ranks)
    if defect == "none":
        assert judge(case, record_of(case, ranks), reference).is_equal
        return
    verdict = judge(case, join_ranks(ranks(2).run(run_with_defect, case, defect)), reference)
    assert any("gradient of vision_proj" in difference.what for difference in verdict.differences), verdict.explain()
